"""Adapters that are written are those that PEFT reads: its logits over transformers' models are ours."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from peft_models import logits, save

from jaxllm.base.errors import ConfigError
from jaxllm.inference.load import load_model
from jaxllm.inference.model import Model
from jaxllm.interop.adapted import changes_of
from jaxllm.interop.huggingface import config_from_huggingface
from jaxllm.interop.open import family_at, open_model
from jaxllm.interop.peft_write import write_adapter
from jaxllm.interop.stored import tensors_of
from jaxllm.models.build import init_params
from jaxllm.models.lora import DoraWeight, LoraWeight, column_lengths
from jaxllm.models.weights import map_weights_with_path

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ALL = ("query", "key", "value", "output", "gate", "up", "down")


@pytest.fixture
def base(tmp_path):
  """family -> the directory of a small random model."""
  return lambda family: save(family, tmp_path / "base")


def adapted(directory, kind, wanted, rank=lambda path: 3):
  """Parameters in memory with random adapters over those whose module, or whose path, is wanted; scale 1.5."""
  keys = iter(jax.random.split(jax.random.key(1), 1000))
  normal = lambda *shape: 0.2 * jax.random.normal(next(keys), shape)  # noqa: E731

  def one(path, w):
    if path.removesuffix("/weight").split("/")[-1] not in wanted and path not in wanted or path.endswith("bias"):
      return w
    *lead, inputs, outputs = w.shape
    r = rank(path)
    parts = dict(a=normal(*lead, inputs, r), b=normal(*lead, r, outputs), scale=1.5)
    if kind == "dora":
      return DoraWeight(w, **parts, magnitude=column_lengths(w) * (1 + normal(*lead, outputs)))
    return LoraWeight(w, **parts)

  return map_weights_with_path(one, open_model(directory).params())


def theirs(directory, adapter):
  """Logits by PEFT, which must know every key."""
  known = json.loads((directory / "config.json").read_text())["architectures"][0]
  model = getattr(transformers, known).from_pretrained(directory, dtype=torch.float32)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = peft.PeftModel.from_pretrained(model, adapter)
  assert not [str(w.message) for w in caught if "missing" in str(w.message).lower()]
  found = peft.set_peft_model_state_dict(model, peft.load_peft_weights(adapter))
  assert not found.unexpected_keys
  return logits(model)


CASES = [
  ("llama", "lora", ALL),
  ("llama", "dora", ALL),
  ("llama", "lora", ("query", "tokens", "head")),
  ("tied", "lora", ("value", "tokens")),
  ("gpt2", "lora", ("query", "key", "value", "up")),
  ("gpt2", "lora", ("value", "positions")),
  ("gpt2", "dora", ALL),
  ("phi3", "lora", ALL),
  ("phi3", "lora", ("key", "gate")),
  ("phi3", "dora", ALL),
  ("bert", "lora", ("query", "value", "down")),
  ("bert", "dora", ("query", "output")),
  ("t5", "lora", ("query", "value", "up")),
  ("t5", "dora", ALL),
  ("gpt2", "lora", ("tokens", "up")),
  ("qwen3", "lora", ALL),
  ("gpt_neox", "lora", ALL),
  ("gpt_neox", "dora", ("query", "key", "value")),
  ("bart", "lora", ALL),
]


@pytest.mark.parametrize("family, kind, wanted", CASES)
def test_peft_reads_what_is_written(base, tmp_path, agrees, family, kind, wanted):
  directory = base(family)
  params = adapted(directory, kind, wanted)
  config = open_model(directory).config
  model = Model(config, params)
  write_adapter(tmp_path / "adapter", config, changes_of(params), base=str(directory), family=family_at(directory))
  subject = f"{kind} of {'/'.join(wanted)} written for PEFT, {family}"
  agrees(subject, "logits", logits(model), theirs(directory, tmp_path / "adapter"))
  again = load_model(directory, adapter=tmp_path / "adapter")
  agrees(subject, "logits, read again", logits(again), logits(model))


@pytest.mark.parametrize(
  "family, wanted",
  [
    ("llama", ("head/weight", "final_norm/scale")),
    ("llama", ("embedding/tokens", "head/weight")),
    ("tied", ("embedding/tokens",)),
    ("gpt2", ("embedding/tokens",)),
    ("bert", ("head/weight", "head/bias", "head/dense/weight", "head/dense/bias")),
  ],
)
def test_modules_that_are_trained_whole_are_saved_for_peft(base, tmp_path, agrees, family, wanted):
  directory = base(family)
  params = adapted(directory, "lora", ("query", "down"))
  flat = traverse_util.flatten_dict(params, sep="/")
  flat |= {path: flat[path] + 0.1 * jax.random.normal(jax.random.key(3), flat[path].shape) for path in wanted}
  params, config = traverse_util.unflatten_dict(flat, sep="/"), open_model(directory).config
  full = tensors_of({path: flat[path] for path in wanted})
  write_adapter(tmp_path / "adapter", config, changes_of(params), full, family=family_at(directory))
  subject = f"{family}, {'/'.join(wanted)} whole, written for PEFT"
  agrees(subject, "logits", logits(Model(config, params)), theirs(directory, tmp_path / "adapter"))
  agrees(
    subject,
    "logits, read again",
    logits(load_model(directory, adapter=tmp_path / "adapter")),
    logits(Model(config, params)),
  )


def test_ranks_and_scales_of_each_matrix_become_patterns_for_peft(base, tmp_path, agrees):
  """Layers and modules of their own ranks and scales, of which the most frequent are r and lora_alpha."""
  directory = base("llama")
  config = open_model(directory).config
  params = adapted(directory, "lora", ("query", "value", "down"), lambda path: 5 if "value" in path else 4)
  flat = traverse_util.flatten_dict(params, sep="/")
  query = flat["blocks/attention/query/weight"]
  narrow = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]], jnp.float32)
  flat["blocks/attention/query/weight"] = dataclasses.replace(
    query, a=query.a * narrow[:, None], b=query.b * narrow[..., None], scales=jnp.asarray([1.0, 2.0])
  )
  params = traverse_util.unflatten_dict(flat, sep="/")
  write_adapter(tmp_path / "adapter", config, changes_of(params), family="llama")
  settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert settings["r"] == 4 and settings["lora_alpha"] == 6
  assert settings["rank_pattern"] == {"self_attn.v_proj": 5, "model.layers.1.self_attn.q_proj": 2}
  agrees(
    "LoRA of several ranks, written for PEFT",
    "logits",
    logits(Model(config, params)),
    theirs(directory, tmp_path / "adapter"),
  )
  again = load_model(directory, adapter=tmp_path / "adapter")
  agrees("LoRA of several ranks, written for PEFT", "logits, read again", logits(again), logits(Model(config, params)))


@pytest.mark.parametrize("family, kind", [("llama", "lora"), ("llama", "dora"), ("phi3", "lora"), ("gpt2", "dora")])
def test_what_went_through_peft_files_is_the_same_to_the_bit(base, tmp_path, family, kind):
  directory = base(family)
  config = open_model(directory).config
  write_adapter(tmp_path / "one", config, changes_of(adapted(directory, kind, ALL)), family=family_at(directory))
  read = open_model(directory, adapter=tmp_path / "one", merge=False).params()
  write_adapter(tmp_path / "two", config, changes_of(read), family=family_at(directory))
  for name in ("adapter_config.json", "adapter_model.safetensors"):
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
  if family == "llama":
    jax.tree.map(np.testing.assert_array_equal, read, adapted(directory, kind, ALL))


def test_what_peft_cannot_say_is_refused(base, tmp_path):
  directory = base("phi3")
  config = open_model(directory).config
  with pytest.raises(ConfigError, match="DoRA in some of its parts only"):
    write_adapter(tmp_path / "x", config, changes_of(adapted(directory, "dora", ("query",))), family="phi3")
  both = changes_of(adapted(directory, "dora", ("down",))) | changes_of(adapted(directory, "lora", ("output",)))
  with pytest.raises(ConfigError, match="some modules have LoRA and others DoRA"):
    write_adapter(tmp_path / "x", config, both, family="phi3")
  directory = save("t5", tmp_path / "t5")
  with pytest.raises(ConfigError, match="an embedding that an encoder and a decoder share"):
    write_adapter(tmp_path / "x", open_model(directory).config, changes_of(adapted(directory, "lora", ("tokens",))))
  assert not (tmp_path / "x").exists()


def test_experts_have_no_module_of_peft(tmp_path):
  """transformers has them in one tensor, and PEFT would pass over their names with a warning."""
  sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
  sizes |= dict(num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=32)
  config = config_from_huggingface({"model_type": "mixtral"} | sizes)

  def one(path, w):
    given = "/moe/" in path and path.endswith("up/weight")
    return LoraWeight(w, jnp.ones((*w.shape[:-1], 2)), jnp.ones((*w.shape[:-2], 2, w.shape[-1]))) if given else w

  changes = changes_of(map_weights_with_path(one, init_params(config, jax.random.key(0))))
  assert changes
  with pytest.raises(ConfigError, match="no module for the matrix of one expert"):
    write_adapter(tmp_path / "x", config, changes, family="mixtral")
  assert not (tmp_path / "x").exists()
