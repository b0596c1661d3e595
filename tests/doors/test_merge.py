"""`convert --merge`: the logits before and after are compared, and a merge that changes them too much is refused."""

import functools
import json
import shutil

import numpy as np
import pytest

from jaxllm.config import load_config
from jaxllm.inference.load import load_model
from jaxllm.interop.adapted import changes_of
from jaxllm.interop.open import open_model
from jaxllm.interop.peft_write import write_adapter
from jaxllm.models.lora import LoraWeight
from jaxllm.models.weights import map_weights_with_path
from jaxllm.training.loop import train

TOKENS = np.arange(16, dtype=np.int32)[None] + 20


def with_lora(random, rank, size, path, w):
  if not path.endswith(("query/weight", "down/weight")):
    return w
  *lead, inputs, outputs = w.shape
  shapes = (*lead, inputs, rank), (*lead, rank, outputs)
  a, b = (random.normal(0, size, shape).astype(np.float32) for shape in shapes)
  return LoraWeight(w, a, b, scale=2.0)


@pytest.fixture(scope="module")
def base(job, tmp_path_factory):
  """A run, and two random adapters of ranks 2 and 3 over its queries and down projections."""
  folder = tmp_path_factory.mktemp("merge")
  train(load_config(str(job), [("training.steps", 1)]), folder / "run")
  stored = open_model(folder / "run")
  for name, rank, size in (("one", 2, 0.3), ("two", 3, 0.2)):
    one = functools.partial(with_lora, np.random.default_rng(rank), rank, size)
    write_adapter(folder / name, stored.config, changes_of(map_weights_with_path(one, stored.params())))
  return folder


def test_merge_says_how_far_the_logits_are(door, base, tmp_path):
  code, out, err = door(
    "convert", f"--from={base / 'run'}", f"--adapter={base / 'one'}", "--merge", f"--to={tmp_path / 'x'}"
  )
  assert code == 0, err
  assert "merging changes logits by up to" in err
  apart = load_model(base / "run", adapter=base / "one")(TOKENS)
  np.testing.assert_allclose(load_model(tmp_path / "x")(TOKENS), apart, atol=1e-5)
  assert json.loads((tmp_path / "x" / "config.json").read_text())["model_type"] == "llama"


def test_merge_refuses_what_changes_too_much(door, base, tmp_path):
  given = [f"--from={base / 'run'}", f"--adapter={base / 'one'}", "--merge", f"--to={tmp_path / 'x'}"]
  code, _, err = door("convert", *given, "--dtype=bfloat16", "--max-difference=1e-6")
  assert code == 2 and "over --max-difference 1e-06 times that; nothing is written" in err and err.count("\n") == 1
  assert not (tmp_path / "x").exists()
  assert door("convert", *given, "--dtype=bfloat16")[0] == 0  # within what 16 bits do
  code, _, err = door("convert", *given[:1], "--merge", f"--to={tmp_path / 'y'}")
  assert code == 2 and "has no adapter to merge" in err and not (tmp_path / "y").exists()


def test_merging_is_summed_in_float32(base, tmp_path):
  """Two adapters over 16 bits are rounded once, and not at all where float32 is written."""
  load_model(base / "run").save(tmp_path / "half", dtype="bfloat16")
  path = "blocks/mlp/down/weight"
  stored = open_model(tmp_path / "half", adapter=[base / "one", base / "two"], merge=False)
  want = stored.tensors[path].read().astype(np.float32)
  for adapter in stored.apart:
    change = adapter.changes[path]
    want = want + 2.0 * np.matmul(change.a.read(), change.b.read())
  np.testing.assert_allclose(stored.merged("float32").tensors[path].read(), want, atol=1e-6)
  merged = stored.merged().tensors[path].read()
  assert merged.dtype.name == "bfloat16"
  np.testing.assert_array_equal(merged, want.astype(merged.dtype))


def test_doors_take_several_adapters(door, base, tmp_path):
  """Of one and half of another, in any door."""
  both = [f"--adapter={base / 'one'}", f"--adapter={base / 'two'}:0.5"]
  want = load_model(base / "run", adapter=[base / "one", (base / "two", 0.5)])
  assert door("convert", f"--from={base / 'run'}", *both, f"--to={tmp_path / 'x'}", "--format=jaxllm")[0] == 0
  np.testing.assert_allclose(load_model(tmp_path / "x")(TOKENS), want(TOKENS), atol=1e-5)
  code, out, _ = door("generate", f"--model={base / 'run'}", *both, "--prompt=ab", "--temperature=0", "--max-tokens=8")
  assert code == 0 and out.strip() == want.generate("ab", temperature=0, max_tokens=8)[0].text.strip()
  data = json.loads((base / "run" / "config.json").read_text())["data"]["dir"]
  code, out, err = door("evaluate", f"--model={base / 'run'}", *both, f"--data={data}", "--json", "--seq-len=32")
  assert code == 0, err
  assert json.loads(out)["eval/loss"] > 0
  code, _, err = door("evaluate", f"--model={base / 'run'}", *both, "--json")
  assert code == 2 and "does not say what it was trained on" in err


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_run_of_its_own_is_merged_on_the_weights_that_it_had(door, job, base, tmp_path, quantize):
  """Its adapters over what it began with, dequantized where it had that in 4 bits; not over the base in files."""
  keys = {"peft.kind": "lora", "optimizer.learning_rate": 0.05, "training.steps": 3}
  keys |= {"model_init.path": str(base / "run"), "model_init.quantize": quantize, "model_init.group_size": 16}
  train(load_config(str(job), list(keys.items())), tmp_path / "run")
  code, _, err = door("convert", f"--from={tmp_path / 'run'}", "--merge", f"--to={tmp_path / 'x'}")
  assert code == 0 and "merging changes logits by up to" in err, err
  np.testing.assert_allclose(load_model(tmp_path / "x")(TOKENS), load_model(tmp_path / "run")(TOKENS), atol=1e-5)
  over_files = load_model(base / "run", adapter=tmp_path / "run" / "adapter", merge=True)(TOKENS)
  far = np.abs(np.asarray(over_files) - np.asarray(load_model(tmp_path / "x")(TOKENS))).max()
  assert far > 1e-3 if quantize else far < 1e-5


def test_text_is_evaluated_with_models_of_other_forms(door, base, tmp_path):
  """An adapter's own directory, a Hugging Face one and a .gguf file: the same loss, or one line that says why not."""
  config = base / "one" / "adapter_config.json"
  adapter = shutil.copytree(base / "one", tmp_path / "adapter")
  settings = json.loads(config.read_text()) | {"base_model_name_or_path": str(base / "run")}
  (adapter / "adapter_config.json").write_text(json.dumps(settings))
  (adapter / "jaxllm_manifest.json").unlink()  # it is meant
  model = load_model(adapter)
  for form, name in (("hf", "hf"), ("gguf", "x.gguf")):
    model.save(tmp_path / name, form)
  data = json.loads((base / "run" / "config.json").read_text())["data"]["dir"]
  losses = {}
  for name in ("adapter", "hf", "x.gguf"):
    code, out, err = door("evaluate", f"--model={tmp_path / name}", f"--data={data}", "--json", "--seq-len=32")
    assert code == 0 or (code == 2 and err.startswith("error: ") and err.count("\n") == 1), err
    if code == 0:
      losses[name] = json.loads(out)["eval/loss"]
    code, _, err = door("evaluate", f"--model={tmp_path / name}", "--json")
    assert code == 2 and err.count("\n") == 1 and "does not say what it was trained on" in err
  assert losses.keys() >= {"adapter", "hf"}
  assert max(losses.values()) - min(losses.values()) < 1e-4
