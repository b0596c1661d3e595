"""`paged_attention` on Hopper: results in the emulator, races included, and the machine code of real shapes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulators import gpu_emulator, needs_emulators
from hopper_code import can_compile, check_machine_code
from paged_oracle import check, make_call, model_shapes

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import KVPages, paged_attention, tuning

SLOPES, SINKS = jnp.array([0.5, 0.25, 0.1, 0.02]), jnp.array([0.3, -1.0, 2.0, 0.0])
SMALL = {"stages": 2, "block": 64}  # so that short sequences use slots again
CASES = {
  "decoding": (dict(lengths=[300, 0, 64, 41], N=4, K=1, page_size=64, unused=1), dict(sinks=SINKS)),
  "decoding, head dim 128, splits": (dict(lengths=[300, 5], H=128, page_size=128), dict(splits=3)),
  "decoding, window, MHA": (dict(lengths=[150, 65], N=2, K=2, page_size=32), dict(window=70, splits=2)),
  "decoding, float16, softcap": (dict(lengths=[90], page_size=16, dtype=jnp.float16), dict(softcap=2.0)),
  "decoding, int8": (dict(lengths=[260, 20], page_size=32, cache=jnp.int8), dict(softcap=5.0, alibi_slopes=SLOPES)),
  "mixed": (dict(lengths=[130, 20], news=[40, 1], N=4, K=1, page_size=16, padding=3), dict(alibi_slopes=SLOPES)),
  "mixed, pages of 128": (dict(lengths=[200, 9], news=[60, 1], page_size=128), dict(window=33, sinks=SINKS)),
  "mixed, int8, splits": (
    dict(lengths=[140, 30], news=[50, 30], N=4, K=1, page_size=64, cache=jnp.int8),
    dict(splits=2, softcap=5.0, alibi_slopes=SLOPES),
  ),
}


def run(call, tiles=SMALL, **options):
  with tuning.trying("paged_attention", tiles), gpu_emulator():
    function = functools.partial(paged_attention, backend="mosaic_gpu", return_lse=True, **options)
    return jax.block_until_ready(jax.jit(function)(*call.arguments))


@needs_emulators
@pytest.mark.parametrize("name", CASES)
def test_emulated(name):
  shape, options = CASES[name]
  call = make_call(**shape)
  result = run(call, **options)
  options = {key: value for key, value in options.items() if key != "splits"}
  check(call, result, **options)


@needs_emulators
def test_own_tiles():
  call = make_call([150, 20], [70, 1], page_size=64)
  check(call, run(call, tiles={}))


@needs_emulators
def test_warpgroups_that_take_turns_see_every_phase_of_their_barriers():
  from jaxllm.kernels.paged import mosaic_gpu

  for head_dim, quantized in itertools.product((64, 128, 192, 256), (False, True)):
    tiles = mosaic_gpu._tiles(head_dim, mosaic_gpu.ROWS, quantized)
    assert tiles.stages % tiles.warpgroups == 0, (head_dim, quantized)
  with pytest.raises(ValueError, match="2 warpgroups in turns take a multiple of 2 stages, not 3"):
    run(make_call([20, 3]), tiles={"stages": 3})


@needs_emulators
def test_deterministic():
  call = make_call([100, 40], [30, 1], N=2, K=1, page_size=64)
  first, second = run(call), run(call)
  np.testing.assert_array_equal(first[0].view(jnp.uint16), second[0].view(jnp.uint16))


@needs_emulators
def test_refuses():
  call = make_call([20, 3], H=64)
  query, pages, *rest = call.arguments
  with pytest.raises(ConfigError, match="float32"):
    paged_attention(query.astype(jnp.float32), pages, *rest, backend="mosaic_gpu", target="h100")
  with pytest.raises(ConfigError, match="head dims"):
    half = KVPages(pages.keys[..., :32], pages.values[..., :32])
    paged_attention(query[..., :32], half, *rest, backend="mosaic_gpu", target="h100")
  with pytest.raises(ConfigError, match="32 to 64 tokens"):
    small = KVPages.zeros(4, 16, 2, 64, "int8")
    paged_attention(query, small, *rest, backend="mosaic_gpu", target="h100")
  with pytest.raises(ConfigError, match="no backend 'mosaic_gpu' on a100"):
    paged_attention(query, pages, *rest, backend="mosaic_gpu", target="a100")


EVERY_OPTION = dict(window=99, softcap=30.0, alibi_slopes=jnp.ones(32), sinks=jnp.ones(32))
MODELS = {
  "decoding": (dict(), {}),
  "decoding, int8, head dim 256, every option": (dict(cache="int8", H=256), EVERY_OPTION),
  "mixed, head dim 256, every option": (dict(tokens=2048, H=256), EVERY_OPTION),
}
MORE_MODELS = {
  "decoding, pages of 128": (dict(page_size=128), {}),
  "decoding, pages of 16": (dict(page_size=16), {}),
  "decoding, int8": (dict(cache="int8"), {}),
  "decoding, Gemma": (dict(N=16, K=8, H=256), dict(window=4096, softcap=50.0)),
  "decoding, head dim 256, every option": (dict(H=256), EVERY_OPTION),
  "mixed": (dict(tokens=2048), {}),
  "mixed, int8": (dict(tokens=2048, cache="int8"), {}),
  "mixed, head dim 64, every option": (dict(tokens=2048, H=64), EVERY_OPTION),
  "mixed, head dim 128, every option": (dict(tokens=2048), EVERY_OPTION),
  "mixed, int8, head dim 256, every option": (dict(tokens=2048, H=256, cache="int8"), EVERY_OPTION),
}


@needs_emulators
@can_compile
@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_MODELS)])
def test_machine_code(name):
  shapes, options = (MODELS | MORE_MODELS)[name]
  function = functools.partial(paged_attention, backend="mosaic_gpu", target="h100", **options)
  check_machine_code(function, model_shapes(**shapes))
