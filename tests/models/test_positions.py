"""RoPE scalings in closed form."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.models.caches import NoCache
from jaxllm.models.config import ModelConfig, RopeScaling
from jaxllm.models.positions import rope_frequencies


def test_unscaled_frequencies():
  got, factor = rope_frequencies(8, 10000.0, None)
  np.testing.assert_allclose(got, [1, 0.1, 0.01, 0.001])
  assert factor == 1


def test_ntk_keeps_the_fastest_wave_and_stretches_the_slowest_by_the_factor():
  plain, _ = rope_frequencies(64, 10000.0, None)
  got, factor = rope_frequencies(64, 10000.0, RopeScaling("ntk", factor=8.0))
  assert factor == 1 and got[0] == plain[0]
  assert got[-1] == pytest.approx(plain[-1] / 8)
  assert (np.diff(plain / got) > 0).all()  # slower waves are stretched more


def test_yarn_and_llama3_leave_fast_waves_alone_and_stretch_slow_ones_fully():
  plain, _ = rope_frequencies(128, 10000.0, None)
  for kind in ("yarn", "llama3"):
    got, _ = rope_frequencies(128, 10000.0, RopeScaling(kind, factor=4.0, original_max_seq_len=2048))
    ratio = plain / got
    assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(4)
    assert (np.diff(ratio) > -1e-12).all() and ((ratio > 1.01) & (ratio < 3.99)).any()


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_scaling_without_its_length(kind):
  with pytest.raises(ConfigError, match=r"model\.rope_scaling\.original_max_seq_len"):
    ModelConfig(rope_scaling=RopeScaling(kind, factor=2.0))


def test_lengths_of_packed_texts():
  """Each text of a row by itself, its padding apart."""
  held = NoCache(segment_ids=jnp.asarray([[1, 1, 1, 2, 2, 0]]))
  got = held.text_lengths(jnp.asarray([[0, 1, 2, 0, 1, 0]]))
  np.testing.assert_array_equal(got, [[3, 3, 3, 2, 2, 1]])
