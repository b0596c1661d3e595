"""How many pages there is memory for, in figures that are given."""

import jax
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine.memory import affordable, free_bytes, page_bytes
from jaxllm.models.config import ModelConfig

SIZES = dict(vocab_size=9, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, max_seq_len=64)


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_a_page(dtype, size):
  one = 16 * 2 * 2 * 8 * size  # tokens, keys and values, heads, their dimension
  assert page_bytes(ModelConfig(**SIZES), 16, dtype, "cpu") == {"global": 3 * one}
  mixed = ModelConfig(**SIZES, sliding_window=8, layer_pattern=("local", "local", "global"))
  assert page_bytes(mixed, 16, dtype, "cpu") == {"local": 2 * one, "global": one}


def test_as_many_as_there_is_room_for():
  wanted, least, sizes = {"global": 100, "local": 40}, {"global": 10, "local": 4}, {"global": 10, "local": 25}
  assert affordable(wanted, least, sizes, 2500) == wanted
  assert affordable(wanted, least, sizes, 1250) == {"global": 50, "local": 20}
  with pytest.raises(ConfigError, match="lower max_model_len"):
    affordable(wanted, least, sizes, 240)


def test_this_machine_has_some():
  assert free_bytes(jax.devices()[0]) > 2**20
