"""`paged_attention` on TPU: results in the emulator, races included, and compiling real shapes for every chip."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulators import needs_emulators, tpu_emulator
from paged_oracle import check, for_tpu, make_call, model_shapes

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import KVPages, paged_attention

SLOPES, SINKS = jnp.array([0.5, 0.25, 0.1, 0.02]), jnp.array([0.3, -1.0, 2.0, 0.0])
CASES = {
  "decoding": (dict(lengths=[130, 0, 64, 41], N=4, K=1, page_size=64, unused=1), dict(sinks=SINKS)),
  "decoding, several blocks, window": (dict(lengths=[1100, 5], N=2, K=2, page_size=128), dict(window=600)),
  "decoding, float32, softcap": (dict(lengths=[150, 90], page_size=32, dtype=jnp.float32), dict(softcap=2.0)),
  "decoding, int8": (dict(lengths=[600, 20], page_size=128, cache=jnp.int8), dict(alibi_slopes=SLOPES)),
  "decoding, fp8": (dict(lengths=[140, 20], page_size=128, cache=jnp.float8_e4m3fn), dict(softcap=5.0)),
  "mixed": (
    dict(lengths=[130, 20, 64], news=[70, 20, 1], N=4, K=1, page_size=32, padding=3),
    dict(alibi_slopes=SLOPES),
  ),
  "mixed, head dim 256": (dict(lengths=[700, 9], news=[60, 1], H=256, page_size=64), dict(window=33, sinks=SINKS)),
  "mixed, int8": (dict(lengths=[260, 30], news=[50, 30], page_size=128, cache=jnp.int8), {}),
  "decoding, head dim 64": (dict(lengths=[150, 0, 41], N=8, K=4, H=64, page_size=64), dict(softcap=3.0)),
  "decoding, head dim 64, an odd head, int8": (
    dict(lengths=[140, 20], N=3, K=3, H=64, page_size=128, cache=jnp.int8),
    dict(alibi_slopes=SLOPES[:3], sinks=SINKS[:3]),
  ),
  "mixed, head dim 64": (
    dict(lengths=[130, 20], news=[70, 1], N=4, K=2, H=64, page_size=32, padding=2),
    dict(window=60, alibi_slopes=SLOPES),
  ),
  "mixed, head dim 80, fp8": (dict(lengths=[140, 9], news=[20, 1], H=80, page_size=128, cache=jnp.float8_e4m3fn), {}),
  "decoding, head dim 32": (dict(lengths=[70], N=6, K=6, H=32, page_size=32), {}),
}


def run(call, **options):
  with tpu_emulator():
    function = functools.partial(paged_attention, backend="pallas_tpu", return_lse=True, **options)
    return jax.block_until_ready(jax.jit(function)(*call.arguments))


@needs_emulators
@pytest.mark.parametrize("name", CASES)
def test_emulated(name):
  shape, options = CASES[name]
  call = make_call(**{"H": 128, "tpu": "head dim" in name, **shape})
  check(call, run(call, **options), **options)


@needs_emulators
def test_two_cores_and_twice_the_same():
  """v4 and v5p: tiles are shared out to two cores, each with a pipeline of its own."""
  call = make_call([150, 40, 0, 90], page_size=128, N=2, K=1, H=128)
  first, second = run(call, target="v5p"), run(call)
  check(call, first)
  np.testing.assert_array_equal(first[0].view(jnp.uint16), second[0].view(jnp.uint16))


@needs_emulators
@pytest.mark.parametrize("window,splits", [(None, None), (600, 3)])
def test_parts_of_the_keys(window, splits):
  """An odd number of tiles on two cores; parts without a block, and a sequence without a key."""
  call = make_call([1600, 40, 0], page_size=128, N=4, K=2, H=64, tpu=True)
  check(call, run(call, target="v5p", window=window, splits=splits), window=window)


@needs_emulators
def test_refuses():
  call = make_call([20, 3], H=64)
  query, pages, *rest = call.arguments
  with pytest.raises(ConfigError, match=r"KVPages.zeros\(target="):
    paged_attention(query, pages, *rest, backend="pallas_tpu", target="v5e")
  with pytest.raises(ConfigError, match="multiple of 128 tokens"):
    small = KVPages.zeros(4, 64, 2, 64, "int8", target="v5e")
    paged_attention(query, small, *rest, backend="pallas_tpu", target="v5e")
  with pytest.raises(ConfigError, match="no backend 'pallas_tpu' on h100"):
    paged_attention(query, pages, *rest, backend="pallas_tpu", target="h100")
  with pytest.raises(ConfigError, match="laid out for a TPU"):
    paged_attention(query, for_tpu(pages), *rest, backend="mosaic_gpu", target="h100")


MODELS = {
  "decoding": (dict(), {}),
  "decoding, pages of 16": (dict(page_size=16), {}),
  "decoding, int8": (dict(page_size=128, cache="int8"), {}),
  "mixed": (dict(tokens=2048), {}),
  "mixed, Gemma": (dict(tokens=512, N=16, K=8, H=256), dict(window=4096, softcap=50.0)),
  "mixed, MHA, every option": (dict(tokens=512, K=32), dict(window=99, softcap=30.0, alibi_slopes=jnp.ones(32))),
  "decoding, fp8": (dict(page_size=128, cache="float8_e4m3fn"), {}),
  "decoding, head dim 64, odd heads": (dict(N=15, K=5, H=64), {}),
  "decoding, head dim 64, int8": (dict(page_size=128, H=64, cache="int8"), {}),
  "mixed, head dim 80": (dict(tokens=512, H=80), dict(window=128)),
  "decoding, one sequence": (dict(sequences=1, length=131072), {}),
}
CHIPS = ["v4", "v5e", "v5p", "v6e", "v7"]
COMPILED = [("decoding", chip) for chip in CHIPS] + [
  pytest.param(name, CHIPS[(i + step) % 5], marks=pytest.mark.slow)
  for i, name in enumerate(list(MODELS)[1:])
  for step in (0, 2)  # of the five, two with different vector memories or numbers of cores
]


@needs_emulators
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu")
@pytest.mark.parametrize("name, chip", COMPILED)
def test_compiles(name, chip):
  from machine_code import compile_tpu

  shapes, options = MODELS[name]
  inputs = model_shapes(**shapes, target=chip)
  function = functools.partial(paged_attention, backend="pallas_tpu", target=chip, **options)
  compiled = compile_tpu(function, inputs, chip)
  assert "paged_attention" in compiled.as_text()
  pages = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(inputs[1]))
  assert compiled.memory_analysis().temp_size_in_bytes < pages / 8, "the cache is copied"
