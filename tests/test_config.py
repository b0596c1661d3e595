"""Config files, overrides and sweeps: what is accepted, and the one line that says what is not."""

import pytest
from ml_collections import ConfigDict

from jaxllm.base.errors import ConfigError
from jaxllm.config import default_config, load_config, resolve, sweep_points, to_config_dict
from jaxllm.models.config import ModelConfig, RopeScaling
from jaxllm.training.config import RunConfig


@pytest.fixture
def write(tmp_path):
  def write(body):
    path = tmp_path / "job.py"
    path.write_text(body)
    return str(path)

  return write


JOB = """
from jaxllm.config import default_config

def get_config():
  c = default_config()
  c.model.embed_dim = 64
  c.training.steps = 7
  c.data.sources = []
  return c
"""


def test_the_defaults_resolve_to_the_default_run():
  assert resolve(default_config()) == RunConfig()


def test_a_preset_survives_the_round_trip():
  model = ModelConfig(embed_dim=96, num_heads=3, rope_scaling=RopeScaling("linear", 2.0), layer_pattern=())
  c = default_config()
  c.model = to_config_dict(model)
  assert resolve(c).model == model


def test_a_plain_config_dict_takes_defaults_for_what_it_leaves_out():
  run = resolve(ConfigDict({"training": {"steps": 3}}))
  assert run.training.steps == 3
  assert run.optimizer == RunConfig().optimizer


@pytest.mark.parametrize(
  "key, text, get, value",
  [
    ("training.steps", "1e3", lambda r: r.training.steps, 1000),
    ("optimizer.learning_rate", "1", lambda r: r.optimizer.learning_rate, 1.0),
    ("optimizer.clip_norm", "None", lambda r: r.optimizer.clip_norm, None),
    ("optimizer.clip_norm", "0.5", lambda r: r.optimizer.clip_norm, 0.5),
    ("logging.wandb", "true", lambda r: r.logging.wandb, True),
    ("data.dir", "1e3", lambda r: r.data.dir, "1e3"),
    ("model.rope_scaling.factor", "8", lambda r: r.model.rope_scaling.factor, 8.0),
    ("mesh.rules.embed", "('data','fsdp')", lambda r: r.mesh.rules.embed, ("data", "fsdp")),
    ("training.sample_prompts", "def ", lambda r: r.training.sample_prompts, ("def ",)),
    ("data.sources", "[{'path': 'a.txt', 'weight': 2}]", lambda r: r.data.sources[0].weight, 2.0),
    ("objective.z_loss", "1", lambda r: r.objective.z_loss, 1.0),
    ("training.batch_size", "4", lambda r: r.model.head_dim, 8),  # sizes that are derived stay derived
  ],
)
def test_overrides_are_read_as_their_keys_types(write, key, text, get, value):
  result = get(load_config(write(JOB), [(key, text)]))
  assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
  "key, text, words",
  [
    ("training.stepz", "1", ["training.stepz", "did you mean training.steps"]),
    ("trainings.steps", "1", ["unknown config key trainings", "training"]),
    ("training.steps", "many", ["training.steps", "many", "whole number"]),
    ("training.steps", "1.5", ["training.steps", "whole number"]),
    ("training.steps", "0", ["training.steps", "at least 1"]),
    ("training.steps.more", "1", ["training.steps", "not a group"]),
    ("logging.wandb", "3", ["logging.wandb", "true or false"]),
    ("optimizer.name", "adam", ["optimizer.name", "did you mean 'adamw'"]),
    ("model.num_heads", "7", ["model.embed_dim 64", "model.num_heads 7"]),
    ("model.num_kv_heads", "3", ["model.num_kv_heads 3", "divisible"]),
    ("model.mlp", "glu", ["model.mlp", "swiglu"]),
    ("model.layer_pattern", "('local',)", ["model.sliding_window"]),
    ("model.rope_scaling.kind", "yarn", ["original_max_seq_len"]),
    ("model.max_seq_len", "8", ["training.seq_len 256", "model.max_seq_len 8"]),
    ("model.vocab_size", "100", ["data.tokenizer.vocab_size 4096", "model.vocab_size 100"]),
    ("training.accumulation", "3", ["training.batch_size 8", "training.accumulation 3"]),
    ("mesh.fsdp", "0", ["mesh.fsdp", "at least 1"]),
    ("mesh.fsdp", "-1", ["only one mesh axis"]),
    ("mesh.rules.embed", "('rows',)", ["mesh.rules.embed", "rows"]),
    ("objective.name", "causal", ["objective.name", "'causal'", "did you mean 'causal_lm'"]),
    ("training.steps", "{[]:1}", ["training.steps", "whole number"]),
    ("logging.every", "0", ["logging.every is 0", "at least 1"]),
    ("training.eval_every", "-1", ["training.eval_every is -1", "negative"]),
    ("profile.steps", "-1", ["profile.steps is -1", "negative"]),
    ("compute", "5", ["config compute is 5"]),
    ("objective.beta", "0.1", ["config key objective.beta belongs to objective.name 'dpo', not to 'causal_lm'"]),
    ("data.sources.5.path", "x", ["data.sources.5.path", "0 entries", "'5'"]),
    ("data.sources.first", "x", ["data.sources.first", "0 entries", "'first'"]),
    ("data.dir", "", ["data.dir is empty", "name the folder"]),
    ("optimizer.learning_rate", "1e999", ["optimizer.learning_rate", "a number"]),
    ("training.steps", "1e999", ["training.steps", "a whole number"]),
    ("data.sources", "[{'paths': 'a'}]", ["data.sources.0.paths", "did you mean data.sources.0.path"]),
  ],
)
def test_a_bad_value_is_one_line_that_names_the_key(write, key, text, words):
  with pytest.raises(ConfigError) as error:
    load_config(write(JOB), [(key, text)])
  message = str(error.value)
  assert "\n" not in message
  for word in words:
    assert word in message


@pytest.mark.parametrize(
  "body, words",
  [
    ("x = 1", ["get_config"]),
    ("def get_config(): return 3", ["int", "ConfigDict"]),
    ("def get_config(): return undefined", ["NameError"]),
    ("import no_such_module", ["does not run", "no_such_module"]),
    ("def f(:", ["does not run", "SyntaxError"]),
  ],
)
def test_a_broken_config_file_is_named(write, body, words):
  path = write(body)
  with pytest.raises(ConfigError) as error:
    load_config(path)
  for word in [path, *words]:
    assert word in str(error.value)


def test_a_missing_config_file_names_the_nearest(write, tmp_path):
  write(JOB)
  with pytest.raises(ConfigError, match=r"no config file .*jobs\.py; did you mean .*job\.py"):
    load_config(str(tmp_path / "jobs.py"))


def test_sweep_points_are_overrides(write):
  path = write(
    JOB
    + """
def sweep(add):
  for steps in (1, 2):
    add(**{"training.steps": steps})
  add({"config.optimizer.learning_rate": 0.5})
"""
  )
  points = sweep_points(path)
  assert points == [{"training.steps": 1}, {"training.steps": 2}, {"optimizer.learning_rate": 0.5}]
  assert [load_config(path, p.items()).training.steps for p in points] == [1, 2, 7]


@pytest.mark.parametrize("body", ["add(3)", "add(**{'training.steps': nothing})", "1 / 0"])
def test_a_sweep_that_fails_is_said(write, body):
  with pytest.raises(ConfigError, match=r"sweep\(add\) fails: (TypeError|NameError|ZeroDivisionError)"):
    sweep_points(write(f"{JOB}\n\ndef sweep(add):\n  {body}\n"))


def test_a_sweep_that_is_missing_is_said(write):
  with pytest.raises(ConfigError, match="no function sweep"):
    sweep_points(write(JOB))


OLD_NAMES = {"training.dtype": "compute.dtype", "training.remat_names": "compute.remat_names"} | {
  "training.z_loss": "objective.z_loss"
}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_an_old_name_is_an_error_that_names_the_new_one(write, old):
  says = f"^config key {old} is called {OLD_NAMES[old]} now$"
  in_file = write(JOB.replace("  return c", f"  c.{old} = None\n  return c"))
  with pytest.raises(ConfigError, match=says):
    load_config(in_file)
  with pytest.raises(ConfigError, match=says):
    load_config(in_file, [(OLD_NAMES[old], "1")])
  for key, value in (old, "1"), ("training", repr({old.split(".")[1]: 1})):
    with pytest.raises(ConfigError, match=says):
      load_config(write(JOB), [(key, value)])
