"""What keeps a run from going wrong: early stopping, the limit on forgetting, the rehearsal, and memory explained."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.data.config import DataConfig, TokenizerConfig
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.peft.lora import Lora
from jaxllm.storage.checkpoints import steps_to_keep
from jaxllm.storage.config import CheckpointConfig, higher_is_better
from jaxllm.training import memory
from jaxllm.training.compile import make_program
from jaxllm.training.config import EarlyStoppingConfig, OptimizerConfig, RunConfig, TrainingConfig
from jaxllm.training.evaluation import Evaluation
from jaxllm.training.rehearsal import full_batch, rehearse
from jaxllm.training.watch import Watch, checkpoints_to_keep, evaluations_so_far

MODEL = ModelConfig(vocab_size=64, embed_dim=32, num_layers=4, num_heads=2, max_seq_len=64)


def watch(values, patience=2, every=1, metric="eval/loss", limit=None, action="stop", directory=None, **stopping):
  config = EarlyStoppingConfig(patience=patience, metric=metric, **stopping)
  training = TrainingConfig(
    eval_every=every, early_stopping=config, replay_dir="x", replay_limit=limit, on_forgetting=action
  )
  seen = values if isinstance(values, dict) else dict(enumerate(values, 1))
  return Watch(training, directory, {step: {metric: value} for step, value in seen.items()})


@pytest.mark.parametrize(
  "values, options, ends, best",
  [
    ([3, 2, 1], {}, None, 3),
    ([3, 2, 2.5], {}, None, 2),
    ([3, 2, 2.5, 2.5], {}, 4, 2),
    ([3, 2, 2.5, 1.9, 2, 2], {}, 6, 4),
    ([3, 2, 2], {}, None, 3),  # of equals the newest
    ([3, 2.9, 2.8, 2.7], {"min_delta": 0.25, "patience": 3}, None, 4),  # small steps add up
    ([3, 2.9, 2.8], {"min_delta": 0.25}, 3, 3),
    ([3, math.nan, math.nan], {}, 3, 1),
    ([0.1, 0.3, 0.2, 0.2], {"metric": "eval/rewards/accuracies"}, 4, 2),
    ([3, 2, 1], {"mode": "max"}, 3, 1),
    ({0: 1.0, 4: 2.0, 8: 3.0}, {"every": 4}, 8, 0),
    ({4: 1.0, 6: 2.0, 8: 2.0}, {"every": 4}, None, 4),  # 6 was the end of a run that was to be shorter
  ],
)
def test_patience(values, options, ends, best):
  found = watch(values, **options)
  assert found.best[0] == best and found.ended == (ends is not None)
  assert (found.patience_ends or "").startswith(f"stopping early at step {ends}" if ends else "")


def test_what_is_better():
  more = ["eval/accuracy", "eval/rewards/accuracies", "eval/rewards/margins", "eval/f1"]
  less = ["eval/loss", "replay/loss", "eval/perplexity", "eval/bits_per_byte", "eval/pair_loss"]
  assert [higher_is_better(name) for name in more + less] == [True] * 4 + [False] * 5
  with pytest.raises(ConfigError, match="early_stopping.mode to 'min' or 'max'"):
    EarlyStoppingConfig(patience=1, metric="eval/logits/chosen")
  with pytest.raises(ConfigError, match="set training.eval_every"):
    TrainingConfig(early_stopping=EarlyStoppingConfig(patience=1))
  with pytest.raises(ConfigError, match="training.replay_dir is not"):
    TrainingConfig(replay_limit=0.1)


def test_the_best_step_is_kept_whichever_way_is_better():
  scores = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.4}
  one = CheckpointConfig(keep_last=1, keep_best=1)
  assert steps_to_keep(scores, 4, one) == {1, 4}
  assert steps_to_keep(scores, 4, dataclasses.replace(one, best_metric="eval/accuracy")) == {2, 4}
  assert steps_to_keep(scores, 4, dataclasses.replace(one, best_mode="max")) == {2, 4}
  training = TrainingConfig(eval_every=1, early_stopping=EarlyStoppingConfig(patience=1, metric="eval/f1"))
  none = dataclasses.replace(one, keep_best=0)
  assert steps_to_keep(scores, 4, dataclasses.replace(none, **checkpoints_to_keep(none, training))) == {2, 4}
  assert checkpoints_to_keep(one, TrainingConfig()) == {}


def test_forgetting():
  rising = {0: 2.0, 5: 2.05, 10: 2.2}
  assert watch(rising, 0, metric="replay/loss", limit=0.3).forgets is None
  over = watch(rising, 0, metric="replay/loss", limit=0.1)
  assert over.ended and "its loss on training.replay_dir is 2.2000, 0.2000 over that of step 0" in over.forgets
  warned = watch(rising, 0, metric="replay/loss", limit=0.1, action="warn")
  assert warned.forgets and not warned.ended
  assert over.risen("replay/") == " (+0.2000 since step 0)" and over.risen("eval/") == ""
  assert watch({0: 2.0}, 0, metric="replay/loss", limit=0.0).forgets is None


def test_evaluations_are_read_again(tmp_path):
  lines = [{"step": 0, "replay/loss": 1.0}, {"step": 2, "loss": 3.0}, {"step": 2, "eval/loss": None}]
  lines += [{"step": 2, "replay/loss": 0.1 + 0.2}]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "ev')
  found = evaluations_so_far(tmp_path)
  assert list(found) == [0, 2] and math.isnan(found[2]["eval/loss"]) and found[2]["replay/loss"] == 0.1 + 0.2


def test_best_is_written_once_it_is_saved(tmp_path):
  found = watch([3, 1, 2], directory=tmp_path)
  found.record([1])
  assert not (tmp_path / "best.json").exists()
  found.record([1, 2])
  assert json.loads((tmp_path / "best.json").read_text()) == {"step": 2, "metric": "eval/loss", "value": 1}


def run_of(training=TrainingConfig(steps=3, batch_size=4, seq_len=16)):
  return RunConfig(model=MODEL, training=training, data=DataConfig(tokenizer=TokenizerConfig(vocab_size=64)))


def program_of(training=TrainingConfig(steps=3, batch_size=4, seq_len=16), **options):
  optimizer, compute = options.pop("optimizer", OptimizerConfig()), options.pop("compute", ComputeConfig())
  mesh, peft = MeshConfig(**options.pop("mesh", {"data": 1})), options.pop("peft", RunConfig().peft)
  return make_program(MODEL, training, optimizer, mesh, make_mesh(mesh), compute_config=compute, peft=peft)


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
  "options",
  [
    dict(training=TrainingConfig(steps=3, batch_size=4, seq_len=16, ema_decay=0.9, spike_sigmas=3.0)),
    dict(optimizer=OptimizerConfig(name="muon"), mesh={"data": 2, "fsdp": 2}),
    dict(optimizer=OptimizerConfig(name="adafactor"), compute=ComputeConfig(dtype="float16")),
    dict(training=TrainingConfig(steps=3, batch_size=4, seq_len=16, accumulation=2, on_bad_step="skip"), peft=Lora()),
  ],
  ids=["ema", "muon on a mesh", "float16", "lora, accumulated"],
)
def test_a_rehearsal_changes_no_bit(options):
  """Neither of a fresh state nor of one with a past; the step that follows is the one that it would have been."""
  program = program_of(**options)
  compiled = program.step.lower(*program.arguments).compile()
  state, frozen = program.init(jax.random.key(0), {})
  evaluation = Evaluation(None, program.evaluate, [], program.batch)
  batch = full_batch(program.batch)
  assert {float(x.min()) for x in (batch["segment_ids"], batch["loss_weights"])} == {1.0}
  for _ in range(2):
    before = bits(state)
    state = rehearse(program, compiled, state, frozen, evaluation, None)
    assert bits(state) == before
    copy = jax.tree.map(jnp.copy, state)
    after, metrics = compiled(copy, frozen, batch)
    state, again = compiled(rehearse(program, compiled, state, frozen), frozen, batch)
    assert bits(after) == bits(state) and bits(metrics) == bits(again) and int(state.step) and bits(state) != before


# A model whose activations outweigh its parameters, so that they can be told apart
BIG = TrainingConfig(steps=3, batch_size=8, seq_len=64)


@pytest.mark.parametrize(
  "flag, change",
  [
    ("training.accumulation=2", dict(training=dataclasses.replace(BIG, accumulation=2))),
    ("compute.remat=full", dict(compute=ComputeConfig(remat="full"))),
    ("peft.kind=lora", dict(peft=Lora(rank=1))),
    ("training.seq_len=32", dict(training=dataclasses.replace(BIG, seq_len=32))),
  ],
)
def test_what_a_way_out_saves(flag, change):
  """The figures are those of the compiled programs, by and large."""

  def need(**options):
    program = program_of(**{"training": BIG, **options})
    return program, memory.estimate(program, program.step.lower(*program.arguments).compile())

  program, before = need()
  analysis = program.step.lower(*program.arguments).compile().memory_analysis()
  assert before.total == pytest.approx(analysis.argument_size_in_bytes + analysis.temp_size_in_bytes, rel=0.01)
  said = dict(memory.ways_out(program, run_of(training=BIG), before))[flag]
  saved = before.total - need(**change)[1].total
  assert saved > 0 and 0.4 < said / saved < 2.5, (said, saved)


def test_the_three_cheapest_come_first():
  program = program_of()
  run = run_of()
  flags = [flag for flag, _ in memory.ways_out(program, run, memory.estimate(program))]
  assert flags[:3] == ["training.accumulation=2", "compute.remat=full", "peft.kind=lora"]
  lora = program_of(peft=Lora())
  run = dataclasses.replace(run, peft=Lora())
  found = dict(memory.ways_out(lora, run, memory.estimate(lora)))
  matrices = 4 * 4 * 32 * (4 * 32 + 3 * MODEL.mlp_dim)
  assert found["model_init.quantize=nf4"] == pytest.approx(matrices * (1 - 4.5 / 32), rel=0.01)
  assert "peft.kind=lora" not in found


def test_the_runtimes_own_error_is_known():
  with pytest.raises(jax.errors.JaxRuntimeError) as caught:
    jax.block_until_ready(jax.jit(lambda: jnp.ones((1 << 22, 1 << 22)))())
  assert memory.is_out_of_memory(caught.value)
  assert not memory.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: something else"))


def test_a_device_that_is_too_small_is_warned_of(monkeypatch, caplog):
  program = program_of()
  compiled = program.step.lower(*program.arguments).compile()
  found = memory.Memory(program, run_of(), compiled)

  class Small:
    def __init__(self, limit):
      self.limit = limit

    def memory_stats(self):
      return {"bytes_limit": self.limit}

  class Mesh:
    size = 1

    def __init__(self, limit):
      self.local_devices = [Small(limit)]

    def __getattr__(self, name):
      return getattr(program.mesh, name)

  for limit, warnings in ((2**34, 0), (2**20, 1)):
    caplog.clear()
    found.program = dataclasses.replace(program, mesh=Mesh(limit))
    found.warn_if_short()
    assert len(caplog.records) == warnings
  assert "a device has 1.0 MiB; what helps, the cheapest first: --config.training.accumulation=2" in caplog.text
