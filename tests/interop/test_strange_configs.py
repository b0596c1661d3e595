"""Config files with values of every wrong kind: the model is loaded or refused in a line, whatever stands where."""

import json

import pytest

from jaxllm.base.errors import UserError
from jaxllm.base.strangers import declared
from jaxllm.inference.generation_config import default_sampling
from jaxllm.interop.directory_files import read_generation_config, read_json
from jaxllm.interop.families import FAMILIES
from jaxllm.interop.families.keys import Keys
from jaxllm.interop.families.table import DEFAULTS
from jaxllm.interop.huggingface import config_from_huggingface
from jaxllm.interop.model_directory import read_model_config
from jaxllm.interop.peft_config import Adapter, read_settings
from jaxllm.interop.stored import param_shapes
from jaxllm.models.config import ModelConfig

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 32}
LLAMA |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
LLAMA |= {"intermediate_size": 128, "max_position_embeddings": 64, "rms_norm_eps": 1e-05, "tie_word_embeddings": True}
LLAMA |= {"initializer_range": 0.02, "rope_theta": 10000.0, "attention_bias": False, "hidden_act": "silu"}
LLAMA |= {"rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "text_config": None}
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "BASE", "r": 4, "lora_alpha": 8, "use_rslora": False}
ADAPTER |= {"target_modules": ["q_proj"], "alpha_pattern": {}, "rank_pattern": {}, "modules_to_save": None}
GENERATION = {"eos_token_id": [2], "temperature": 0.5, "top_k": 3, "max_new_tokens": 4, "do_sample": True}
GENERATION |= {"bad_words_ids": [[1]], "suppress_tokens": [1], "forced_eos_token_id": 2, "num_beams": 1}
OURS = {"vocab_size": 512, "embed_dim": 32, "num_layers": 2, "num_heads": 2, "mlp_dim": 64, "rope_scaling": None}
OURS |= {"layer_pattern": [], "moe": None, "norm_eps": 1e-5, "sliding_window": None, "init": "gpt2", "adapter": None}
STRANGE = [
  *("NaN", "Infinity", "1e400", '"\\ud800"', "9" * 5000, "[" * 200 + "]" * 200),  # as JSON has them
  *map(json.dumps, (None, True, 0, -1, -0.5, 10**12, 10**30, 2**31, 2**64, 1e308, 10**400)),
  *map(json.dumps, ("", "llama", "float99", "1e9", "line\nbreak", "\0", "a" * 5000, "../../etc/passwd", "\x1b[31m")),
  *map(json.dumps, ([], [None], [0], [1, "a"], [{}], {}, {"a": 1}, {"type": None}, {"rope_type": "x"}, {".*": None})),
]


def with_value(config, key, raw):
  return json.dumps(config | {key: "RAW"}).replace('"RAW"', raw)


def loads_or_refuses(read):
  try:
    read()
  except UserError as error:
    assert str(error).isprintable() and len(str(error)) <= 480
    return False
  return True


@pytest.mark.parametrize("key", LLAMA)
def test_config_json(tmp_path, key):
  def read():
    found = read_json(tmp_path / "config.json")
    return param_shapes(config_from_huggingface(found))

  loaded = []
  for raw in STRANGE:
    (tmp_path / "config.json").write_text(with_value(LLAMA, key, raw))
    loaded.append(loads_or_refuses(read))
  assert not all(loaded)


@pytest.mark.parametrize("key", ADAPTER)
def test_adapter_config_json(tmp_path, key):
  def read():
    settings = read_settings(tmp_path)[1]
    return settings.means("model.layers.0.q_proj"), settings.scale_of("model.layers.0.q_proj")

  for raw in STRANGE:
    (tmp_path / "adapter_config.json").write_text(with_value(ADAPTER, key, raw))
    loads_or_refuses(read)


@pytest.mark.parametrize("key", GENERATION)
def test_generation_config_json(tmp_path, key):
  for raw in STRANGE:
    (tmp_path / "generation_config.json").write_text(with_value(GENERATION, key, raw))
    loads_or_refuses(lambda: default_sampling(read_generation_config(tmp_path)))


@pytest.mark.parametrize("key", OURS)
def test_our_config_json(tmp_path, key):
  for raw in STRANGE:
    (tmp_path / "config.json").write_text(json.dumps({"model": "RAW"}).replace('"RAW"', with_value(OURS, key, raw)))
    loads_or_refuses(lambda: param_shapes(read_model_config(tmp_path)))


def test_numbers_as_text_and_as_floats_are_what_they_say():
  theirs = {key: str(value) if type(value) in (int, float) else value for key, value in LLAMA.items()}
  wanted = config_from_huggingface(LLAMA | {"text_config": {}})
  assert config_from_huggingface(theirs) == wanted
  theirs = {key: float(value) if type(value) is int else value for key, value in LLAMA.items()}
  assert config_from_huggingface(theirs) == wanted


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(hidden_size=10**12), "hidden_size is 1000000000000; it must be"),
    (dict(hidden_size=2**30), "embed_dim is 1073741824; it must be from 1 to 1048576"),
    (dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; it must be from 1 to 4096"),
    (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
    (dict(vocab_size=-5), "vocab_size is -5"),
    (dict(tie_word_embeddings=1), "tie_word_embeddings is 1; it should be true or false"),
    (dict(num_attention_heads=True), "num_attention_heads is True; it should be a whole number"),
    (dict(rope_scaling=dict(rope_type="linear")), "without a factor"),
    (dict(rope_scaling=dict(rope_type="linear", factor=0)), "rope_scaling.factor is 0"),
    (dict(rms_norm_eps=-1.0), "norm_eps is -1.0; it must be from 0 to 1"),
  ],
)
def test_sizes_that_no_model_has_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    config_from_huggingface(LLAMA | change)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_key_of_a_family_is_declared(family):
  assert {*family.keys.values(), *family.defaults, *DEFAULTS} <= Keys.__annotations__.keys()
  declared(Keys, {key: value for key, value in family.defaults.items() if value is not None}, "defaults")


def test_fields_of_a_model_are_in_their_ranges():
  for change in (dict(norm_eps="x"), dict(num_heads=True), dict(rope_theta=0), dict(mlp_dim=2**40), dict(head_dim=-1)):
    with pytest.raises(UserError, match=f"^model.{next(iter(change))} is "):
      ModelConfig(**change)


def test_an_adapter_s_numbers_may_be_text(tmp_path):
  (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER | {"r": "8", "lora_alpha": "16"}))
  assert read_settings(tmp_path)[1].rank == 8 and read_settings(tmp_path)[1].alpha == 16
  assert set(Adapter.__annotations__) >= {"r", "lora_alpha", "rank_pattern"}
