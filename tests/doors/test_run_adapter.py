"""A finished run's RUN/adapter: the adapter by itself, which makes the base what the run is."""

import dataclasses
import json

import numpy as np
import pytest
from test_hosts import ends, start_two

from jaxllm.base.errors import CheckpointError
from jaxllm.config import load_config
from jaxllm.inference.load import load_model
from jaxllm.inference.model import Model
from jaxllm.interop.open import open_model
from jaxllm.interop.safetensors import read_safetensors
from jaxllm.models.quantization import quantize_matrix
from jaxllm.models.weights import map_weights_with_path
from jaxllm.prepare import prepare_and_report
from jaxllm.training.loop import train
from jaxllm.training.start import with_tokenizer

LORA = {"peft.kind": "lora", "peft.rank": 2, "optimizer.learning_rate": 0.05}
TOKENS = np.arange(16, dtype=np.int32)[None] + 20


def run(job, directory, **keys):
  return train(load_config(str(job), list({**keys}.items())), directory)


@pytest.fixture(scope="module")
def base(job, tmp_path_factory):
  directory = tmp_path_factory.mktemp("base")
  run(job, directory / "run", **{"training.steps": 2})
  load_model(directory / "run").save(directory / "hf", format="hf")
  return directory


@pytest.mark.parametrize("form", ["run", "hf"])
def test_the_base_with_the_adapter_is_the_run(job, base, tmp_path, form):
  run(job, tmp_path / "run", **LORA, **{"model_init.path": str(base / form), "training.steps": 3})
  before = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
  assert before["base_model_name_or_path"] == str(base / form) and before["r"] == 2
  run(job, tmp_path / "run", **LORA, **{"model_init.path": str(base / form), "training.steps": 5})  # goes on
  want = load_model(tmp_path / "run")(TOKENS)
  apart = load_model(base / form, adapter=tmp_path / "run" / "adapter")
  np.testing.assert_allclose(apart(TOKENS), want, atol=1e-5)
  np.testing.assert_allclose(load_model(tmp_path / "run" / "adapter")(TOKENS), want, atol=1e-5)
  assert np.abs(np.asarray(load_model(base / form)(TOKENS)) - want).max() > 1e-2


KINDS = {
  "dora": {"peft.kind": "dora"},
  "pissa": {"peft.init": "pissa"},
  "rslora": {"peft.rslora": True, "peft.rank_pattern": {"query": 3}, "peft.alpha_pattern": {"down": 5.0}},
  "embedding": {"peft.targets": ("embedding/tokens", "query", "value")},
  "head": {"peft.targets": ("query", "up"), "peft.modules_to_save": ("head", "final_norm")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(job, base, tmp_path, kind):
  """The base with the adapter is the run, which is not the base; so it is where the adapter is read twice."""
  keys = LORA | KINDS[kind] | {"model_init.path": str(base / "hf"), "training.steps": 3}
  keys |= {"model.tie_embeddings": False} if kind == "head" else {}
  run(job, tmp_path / "run", **keys)
  want = load_model(tmp_path / "run")(TOKENS)
  assert np.abs(np.asarray(load_model(base / "hf")(TOKENS)) - want).max() > 1e-3
  adapter = tmp_path / "run" / "adapter"
  np.testing.assert_allclose(load_model(base / "hf", adapter=adapter)(TOKENS), want, atol=3e-5)
  np.testing.assert_allclose(load_model(base / "hf", adapter=adapter, merge=True)(TOKENS), want, atol=3e-5)


@pytest.mark.parametrize("kind", ["dora"])
def test_two_processes_write_one(job, base, tmp_path, kind):
  """Of parts that each has half of."""
  keys = LORA | {"peft.kind": kind, "model_init.path": base / "hf", "training.steps": 2, "mesh.data": 1, "mesh.fsdp": 2}
  ends(start_two(job, tmp_path / "run", *(f"--config.{name}={value}" for name, value in keys.items())))
  want = load_model(tmp_path / "run")(TOKENS)
  assert np.abs(np.asarray(load_model(base / "hf")(TOKENS)) - want).max() > 1e-3
  apart = load_model(base / "hf", adapter=tmp_path / "run" / "adapter")
  np.testing.assert_allclose(apart(TOKENS), want, atol=3e-5)


def test_it_has_the_tokenizer_and_the_rows_of_new_tokens(job, base, tmp_path):
  keys = LORA | {"model_init.path": str(base / "hf"), "model_init.new_tokens": ("<a>", "<b>"), "training.steps": 3}
  keys |= {"data.dir": str(tmp_path / "data")}
  prepare_and_report(with_tokenizer(load_config(str(job), list(keys.items()))).data)
  run(job, tmp_path / "run", **keys)
  want, alone = load_model(tmp_path / "run"), load_model(tmp_path / "run" / "adapter")
  first = load_model(base / "hf").tokenizer.vocab_size
  assert alone.tokenizer.encode("<b>").tolist()[-1] == first + 1 == want.tokenizer.encode("<b>").tolist()[-1]
  assert alone.config.vocab_size == want.config.vocab_size
  ids = np.array([[first, first + 1, *range(20, 28)]], np.int32)
  np.testing.assert_allclose(alone(ids), want(ids), atol=3e-5)


def test_over_quantized_weights(job, base, tmp_path):
  quantized = {"model_init.quantize": "nf4", "model_init.group_size": 16}
  run(job, tmp_path / "run", **LORA, **quantized, **{"model_init.path": str(base / "run")})

  def rounded(path, w):
    under = getattr(w, "base", w)
    new = quantize_matrix(path, under, "nf4", 16)
    return dataclasses.replace(w, base=new) if under is not w else new

  stored = open_model(base / "run", adapter=tmp_path / "run" / "adapter", merge=False)
  model = Model(stored.config, map_weights_with_path(rounded, stored.params()))
  np.testing.assert_allclose(model(TOKENS), load_model(tmp_path / "run")(TOKENS), atol=1e-5)


def test_over_another_adapter(job, base, tmp_path):
  """It names no base: the model that the run began with is one with the other adapter in it."""
  more = LORA | {"model_init.path": str(base / "hf"), "training.steps": 2}
  run(job, tmp_path / "one", **more)
  run(job, tmp_path / "two", **more, **{"model_init.adapter": str(tmp_path / "one" / "adapter")})
  want, own = load_model(tmp_path / "two")(TOKENS), tmp_path / "two" / "adapter"
  both = load_model(base / "hf", adapter=[tmp_path / "one" / "adapter", own])
  np.testing.assert_allclose(both(TOKENS), want, atol=3e-5)
  with pytest.raises(CheckpointError, match="does not say what it belongs to"):
    load_model(own)
  run(job, tmp_path / "other", **more | {"training.steps": 3})
  (tmp_path / "one" / "adapter").rename(tmp_path / "before")
  (tmp_path / "other" / "adapter").rename(tmp_path / "one" / "adapter")
  with pytest.raises(CheckpointError, match="began with .*one/adapter, which has changed since; put back what was"):
    load_model(tmp_path / "two")


def test_of_fresh_weights_and_of_all_weights(job, tmp_path, caplog):
  caplog.set_level("INFO", "jaxllm")
  run(job, tmp_path / "fresh", **LORA, **{"training.steps": 2})
  assert "belongs to the weights that this run began with" in caplog.text
  config = json.loads((tmp_path / "fresh" / "adapter" / "adapter_config.json").read_text())
  assert config["base_model_name_or_path"] is None
  run(job, tmp_path / "full", **{"training.steps": 2})
  assert not (tmp_path / "full" / "adapter").exists()


def test_of_a_model_without_a_family(job, tmp_path, caplog):
  odd = {"model.norm_placement": "sandwich", "model.mlp": "relu2"}
  run(job, tmp_path / "run", **LORA, **odd, **{"training.steps": 2})
  assert "no Hugging Face family can express" in caplog.text and not (tmp_path / "run" / "adapter").exists()


SHARDED = """
import sys
from pathlib import Path
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxllm.models.config import ModelConfig
from jaxllm.models.lora import LoraWeight
from jaxllm.peft.lora import Lora
from jaxllm.training.config import RunConfig
from jaxllm.training.run_adapter import write_run_adapter
mesh = Mesh(np.asarray(jax.devices()), ("x",))
def put(x, *spec):
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
model = ModelConfig(vocab_size=4096, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_seq_len=256)
a, b = (np.arange(64, dtype=np.float32).reshape(shape) + 1 for shape in ((2, 16, 2), (2, 2, 16)))
w = LoraWeight(put(np.ones((2, 16, 16), np.float32), None, "x"), put(a, None, "x"), put(b), scale=0.5)
tree = lambda w: {"blocks": {"attention": {"query": {"weight": w}}}}
trained = LoraWeight(None, w.a, w.b, scale=0.5)
write_run_adapter(Path(sys.argv[1]), RunConfig(model=model, peft=Lora(rank=2)), tree(w), tree(trained))
"""


def test_of_shards_on_two_processes(tmp_path, two_processes):
  two_processes(SHARDED, tmp_path, devices=2)
  tensors = read_safetensors(tmp_path / "adapter" / "adapter_model.safetensors")
  want = np.arange(64, dtype=np.float32).reshape(2, 32) + 1
  for layer in range(2):
    name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
    np.testing.assert_array_equal(tensors[name + "A.weight"].read(), want[layer].reshape(16, 2).T)
    np.testing.assert_array_equal(tensors[name + "B.weight"].read(), want[layer].reshape(2, 16).T)
