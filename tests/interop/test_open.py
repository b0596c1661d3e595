"""Which form a path has, what a stored model knows of itself, and its weights on devices."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.open import open_model
from jaxllm.interop.safetensors import write_safetensors
from jaxllm.interop.stored import StoredModel, tensors_of
from jaxllm.interop.tensors import in_memory
from jaxllm.interop.write import write_model
from jaxllm.models.build import init_params, unstack_layers
from jaxllm.models.config import ModelConfig
from jaxllm.parallel.config import AxisRules, MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.storage.checkpoints import Checkpoints
from jaxllm.training.config import CheckpointConfig

CONFIG = ModelConfig(vocab_size=640, embed_dim=16, num_layers=3, num_heads=2, mlp_dim=24, max_seq_len=16)


@pytest.fixture(scope="module")
def params():
  return init_params(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def forms(params, sentencepiece, tmp_path_factory):
  """A folder with one model in every form; the adapter's change of a layer's query is all ones."""
  folder = tmp_path_factory.mktemp("forms")
  tokenizer = sentencepiece["bpe"]
  tokenizer.settings["chat_template"] = "{{ messages[0].content }}"
  model = StoredModel(CONFIG, tensors_of(params), tokenizer, {"eos_token_id": [2], "temperature": 0.5})
  for name, format in (("ours", "jaxllm"), ("hf", "hf"), ("file.gguf", "gguf")):
    write_model(model, folder / name, format=format)
  run, adapter = folder / "run", folder / "adapter"
  groups = {"data": {"dir": "data/x"}, "objective": {"name": "causal_lm"}, "training": {"seq_len": 8}}
  tokenizer.save(run / "tokenizer")
  (run / "config.json").write_text(json.dumps(json.loads((folder / "ours" / "config.json").read_text()) | groups))
  with Checkpoints(run / "checkpoints", CheckpointConfig()) as checkpoints:
    checkpoints.save(3, {"params": params, "step": np.int32(3)})
  adapter.mkdir()
  settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "../hf"}
  (adapter / "adapter_config.json").write_text(json.dumps(settings))
  name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
  pair = {name.format("A"): np.ones((1, 16), np.float32), name.format("B"): np.ones((16, 1), np.float32)}
  write_safetensors(adapter / "adapter_model.safetensors", in_memory(pair))
  return folder


@pytest.mark.parametrize("name, form", [("ours", "jaxllm"), ("hf", "hf"), ("file.gguf", "gguf"), ("run", "run")])
def test_every_form_is_the_same_model(forms, params, name, form):
  model = open_model(forms / name)
  assert (model.form, model.path, model.adapters) == (form, forms / name, ())
  assert model.config == CONFIG and model.dtype == "float32"
  assert model.chat_template == "{{ messages[0].content }}"
  assert (
    model.tokenizer.encode("def f(x):").tolist() == open_model(forms / "ours").tokenizer.encode("def f(x):").tolist()
  )
  if name != "run":
    assert model.generation["eos_token_id"] == [2]
  jax.tree.map(np.testing.assert_array_equal, model.params(), params)
  assert model.run.get("data") == ({"dir": "data/x"} if name == "run" else None)


def test_an_adapter_is_opened_alone_or_with_a_model(forms, params):
  query = "blocks/attention/query/weight"
  want = np.array(params["blocks"]["attention"]["query"]["weight"])
  want[1] += 1
  alone = open_model(forms / "adapter")
  assert (alone.form, alone.path, alone.adapters[0]["r"]) == ("adapter", forms / "adapter", 1)
  np.testing.assert_array_equal(alone.tensors[query].read(), want)
  for name in ("ours", "hf", "file.gguf", "run"):
    model = open_model(forms / name, adapter=forms / "adapter")
    assert model.path == forms / name and len(model.adapters) == 1 and not model.run
    np.testing.assert_array_equal(model.tensors[query].read(), want)
  twice = open_model(forms / "adapter", adapter=forms / "adapter")
  assert len(twice.adapters) == 2
  np.testing.assert_array_equal(twice.tensors[query].read()[1], want[1] + 1)
  with pytest.raises(CheckpointError, match="is no adapter: an adapter's directory has an adapter_config.json"):
    open_model(forms / "hf", adapter=forms / "ours")


def test_an_adapter_that_names_itself_is_refused(forms, tmp_path):
  adapter = shutil.copytree(forms / "adapter", tmp_path / "adapter")
  settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(adapter)}
  (adapter / "adapter_config.json").write_text(json.dumps(settings))
  with pytest.raises(CheckpointError, match="no path to another model"):
    open_model(adapter)


def test_a_huggingface_directory_with_checkpoints_in_it_is_no_run(forms):
  (forms / "hf" / "checkpoints").mkdir()
  assert open_model(forms / "hf").form == "hf"
  (forms / "hf" / "checkpoints").rmdir()


@pytest.mark.parametrize(
  "path, found",
  [
    ("hf/model.safetensors", "not a model but a file"),
    ("run/checkpoints/3", "not a model but a directory with data.json, manifest.json, state"),
    ("empty", "not a model but an empty directory"),
    ("", "not a model but a directory with adapter, empty, file.gguf and 3 more"),
  ],
)
def test_what_is_no_model_is_described(forms, path, found):
  (forms / "empty").mkdir(exist_ok=True)
  with pytest.raises(CheckpointError, match=found) as raised:
    open_model(forms / path)
  assert "\n" not in str(raised.value) and "a file ends in .gguf" in str(raised.value)


def test_a_checkpoint_of_another_model_is_refused(forms, tmp_path):
  run = shutil.copytree(forms / "run", tmp_path / "run")
  config = json.loads((run / "config.json").read_text())
  config["model"] |= {"attention_bias": True}
  (run / "config.json").write_text(json.dumps(config))
  with pytest.raises(CheckpointError, match="checkpoints do not fit config.json: blocks/attention/key/bias has shape"):
    open_model(run)


def test_weights_are_placed_as_fresh_ones_are(forms):
  """Values of the file, in the tree, with the shardings and types that a training run's state has."""
  mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices())
  model, rules = open_model(forms / "hf"), AxisRules(mlp=(), vocab=("tensor", "fsdp"), embed=())
  for given in (AxisRules(), rules):
    placed = model.params("bfloat16", mesh, given)
    fresh = init_params(CONFIG, jax.random.key(0), mesh, given)
    assert jax.tree.map(lambda w: w.sharding, placed) == jax.tree.map(lambda w: w.sharding, fresh)
    assert {w.dtype.name for w in jax.tree.leaves(placed)} == {"bfloat16"}
    jax.tree.map(lambda got, w: np.testing.assert_array_equal(got, w.astype("bfloat16")), placed, fresh)


def test_layers_apart_and_back(forms, params):
  apart = open_model(forms / "ours").params(per_layer=True)
  assert jax.tree.structure(apart) == jax.tree.structure(unstack_layers(params))
  tensors = tensors_of(apart)
  assert tensors.keys() == tensors_of(params).keys()
  for path, tensor in tensors_of(params).items():
    assert (tensors[path].shape, tensors[path].dtype) == (tensor.shape, tensor.dtype)
    np.testing.assert_array_equal(tensors[path].read(), tensor.read())


def test_a_tensor_that_has_no_parts_is_read_once(forms):
  reads = []
  stored = open_model(forms / "run")

  def counted(path, tensor):
    return dataclasses.replace(tensor, read=lambda: reads.append(path) or tensor.read())

  stored = dataclasses.replace(stored, tensors={path: counted(path, t) for path, t in stored.tensors.items()})
  stored.params()
  assert sorted(reads) == sorted(stored.tensors)


def test_a_mesh_that_does_not_divide_the_model(forms):
  mesh = make_mesh(MeshConfig(data=1, tensor=3), jax.devices()[:3])
  with pytest.raises(ConfigError, match="does not divide over mesh.tensor"):
    open_model(forms / "ours").params(mesh=mesh)
