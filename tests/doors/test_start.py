"""Where a run begins: a model in files, adapters and quantized weights over it; killed and resumed; read again."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.config import load_config
from jaxllm.inference.load import load_model
from jaxllm.interop.open import open_model
from jaxllm.kernels import dequantize, quantize
from jaxllm.training.loop import train
from jaxllm.training.start import open_start

LORA = {"peft.kind": "lora", "peft.rank": 2, "optimizer.learning_rate": 0.05}
TOKENS = np.arange(16, dtype=np.int32)[None] + 20


def losses(directory):
  rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def run(job, directory, **keys):
  return train(load_config(str(job), list({**keys}.items())), directory)


@pytest.fixture(scope="module")
def base(job, tmp_path_factory):
  """A run of a few steps."""
  directory = tmp_path_factory.mktemp("base") / "run"
  run(job, directory)
  return directory


FORMS = {
  "run": lambda base, to: base,
  "jaxllm": lambda base, to: saved(base, to),
  "hf": lambda base, to: saved(base, to, "hf"),
}


def saved(base, to, format="jaxllm"):
  load_model(base).save(to / format, format=format)
  return to / format


@pytest.mark.parametrize("form", FORMS)
def test_a_run_begins_with_a_model_of_any_form(job, base, tmp_path, form):
  path = FORMS[form](base, tmp_path)
  result = run(job, tmp_path / "tuned", **{"model_init.path": str(path), "optimizer.learning_rate": 0.0})
  before, after = load_model(base), load_model(tmp_path / "tuned")
  np.testing.assert_allclose(after(TOKENS), before(TOKENS), atol=1e-5)
  assert result["eval/loss"] == pytest.approx(losses_at_the_end(base), abs=1e-5)
  config = json.loads((tmp_path / "tuned" / "config.json").read_text())
  assert config["model"]["embed_dim"] == 32 and config["model_init"]["step"] == (6 if form == "run" else None)


def losses_at_the_end(directory):
  rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
  return [row["eval/loss"] for row in rows if "eval/loss" in row][-1]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapters_over_a_model_resume_bit_for_bit(job, base, tmp_path, quantize):
  """Interrupted twice, the curve is the same; checkpoints have no frozen leaf, and the run is read as one model."""
  more = LORA | {"model_init.path": str(base)}
  if quantize:
    more |= {"model_init.quantize": quantize, "model_init.group_size": 16}
  run(job, tmp_path / "whole", **more)
  for steps in (2, 4, 6):
    run(job, tmp_path / "parts", **more, **{"training.steps": steps, "optimizer.schedule": "constant"})
  run(job, tmp_path / "constant", **more, **{"optimizer.schedule": "constant"})
  assert losses(tmp_path / "parts") == losses(tmp_path / "constant")
  manifest = json.loads((tmp_path / "whole" / "checkpoints" / "6" / "manifest.json").read_text())
  names = [name for name in manifest["tree"] if name.startswith("params/")]
  assert len(names) == 2 * 7 and all(name.endswith(("/weight/a", "/weight/b")) for name in names)
  record = json.loads((tmp_path / "whole" / "start.json").read_text())
  assert record["path"] == str(base) and len(record["digest"]) == 64
  model, under = open_model(tmp_path / "whole"), open_model(base)
  path = "blocks/mlp/up/weight"
  a, b = (np.asarray(restored(tmp_path / "whole", f"{path}/{part}")) for part in "ab")
  want = under.tensors[path].read()
  if quantize:
    want = np.asarray(dequantize(quantize_(want, quantize)))
  np.testing.assert_allclose(model.tensors[path].read(), want + 16 / 2 * a @ b, atol=1e-6)
  assert np.abs(a @ b).max() > 1e-3
  tuned = load_model(tmp_path / "whole")
  assert np.abs(np.asarray(tuned(TOKENS)) - np.asarray(load_model(base)(TOKENS))).max() > 1e-2


def quantize_(w, format):
  return quantize(jax.numpy.asarray(w), format, 16)


def restored(directory, path):
  from jaxllm.storage.reading import open_params

  return open_params(directory / "checkpoints")[path].read()


def test_frozen_fresh_weights_are_kept_once(job, tmp_path):
  """A run without a model to begin with keeps what it does not train beside its checkpoints."""
  run(job, tmp_path / "run", **LORA)
  run(job, tmp_path / "run", **LORA, **{"training.steps": 8})
  assert [p.name for p in (tmp_path / "run" / "start").iterdir() if p.is_dir()] == ["0"]
  tuned = open_model(tmp_path / "run")
  assert tuned.tensors.keys() == open_model(tmp_path / "run").tensors.keys()
  load_model(tmp_path / "run")(TOKENS)
  (tmp_path / "run" / "start" / "0" / "manifest.json").unlink()
  with pytest.raises(CheckpointError):
    load_model(tmp_path / "run")


def test_the_base_must_stay_what_it_was(job, base, tmp_path):
  moved = tmp_path / "base"
  shutil.copytree(saved(base, tmp_path), moved)
  more = LORA | {"model_init.path": str(moved)}
  run(job, tmp_path / "run", **more)
  (moved / "generation_config.json").write_text('{"temperature": 0.5}')
  (moved / "jaxllm_manifest.json").unlink()  # it is meant
  load_model(tmp_path / "run")  # that is no part of the weights
  load_model(base).save(moved, dtype="bfloat16")
  with pytest.raises(CheckpointError, match="whose digest was"):
    run(job, tmp_path / "run", **more, **{"training.steps": 8})
  with pytest.raises(CheckpointError, match="began with .*base, which has changed since; put back what was there"):
    load_model(tmp_path / "run")
  shutil.rmtree(moved)
  with pytest.raises(CheckpointError, match="no model at .*base: there is no such file or folder"):
    load_model(tmp_path / "run")


def test_a_run_that_trains_all_goes_on_without_its_base(job, base, tmp_path):
  path = shutil.copytree(saved(base, tmp_path), tmp_path / "base")
  more = {"model_init.path": str(path)}
  run(job, tmp_path / "run", **more)
  shutil.rmtree(path)
  assert run(job, tmp_path / "run", **more, **{"training.steps": 8})["step"] == 8


@pytest.mark.parametrize(
  "keys, message",
  [
    ({"model.embed_dim": 64}, r"has blocks/attention/key/weight of shape \(2, 32, 32\)"),
    ({"peft.kind": "lora", "peft.targets": ("qery",)}, "'qery' matches no module; there are blocks/attention/key"),
    ({"peft.kind": "lora", "peft.rank": 0}, "peft.rank is 0"),
    ({"peft.rank": 4}, "peft.rank belongs to peft.kind 'lora'"),
    ({"model_init.quantize": "nf4", "model_init.group_size": 48}, r"blocks/\S+: groups of 48 do not divide"),
    ({"model_init.quantize": "nf5"}, "model_init.quantize is 'nf5'"),
    ({"model_init.path": "nowhere"}, "no such file or folder"),
  ],
)
def test_mistakes_are_one_line(job, base, tmp_path, keys, message):
  with pytest.raises((ConfigError, CheckpointError), match=message) as error:
    run(job, tmp_path / "run", **{"model_init.path": str(base), **keys})
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_the_config_makes_another_model_is_said(job, base, caplog):
  """A count of heads changes no shape, so that nothing else would tell."""
  caplog.set_level("INFO", "jaxllm")
  keys = [("model_init.path", str(base)), ("model.num_heads", 4), ("model.num_kv_heads", 4)]
  open_start(load_config(str(job), keys), base / "nowhere")
  assert "model.num_heads is 4, not 2" in caplog.text and "embed_dim" not in caplog.text


def test_the_tokenizer_comes_along(job, base, tmp_path):
  from jaxllm.training.start import with_tokenizer

  config = load_config(str(job), [("model_init.path", str(base)), ("data.tokenizer.vocab_size", 4096)])
  assert Path(with_tokenizer(config).data.tokenizer.path) == base / "tokenizer"
  named = load_config(str(job), [("model_init.path", str(base)), ("data.tokenizer.path", "mine")])
  assert with_tokenizer(named).data.tokenizer.path == "mine"


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_one_host_does_not_see(base, tmp_path, two_processes, form):
  """Both say so at once: the one that sees it does not wait for the other."""
  code = """
  import sys
  from jaxllm.base.errors import UserError
  from jaxllm.training.start import _open
  try:
    _open(sys.argv[1] if index == 0 else "nowhere")
  except UserError as error:
    print("error:", error)
  assert _open(sys.argv[1]).config.embed_dim == 32
  """
  one, other = two_processes(code, FORMS[form](base, tmp_path), timeout=60)
  assert "error: process 1 failed: no model at nowhere" in one and "error: no model at nowhere" in other
