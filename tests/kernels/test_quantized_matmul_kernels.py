"""The kernels for accelerators: in their emulators against float64, and compiled ahead of time at real shapes."""

import dataclasses
import functools
import importlib.util
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantized_oracle as oracle
from emulators import RECENT, gpu_emulator, needs_emulators, tpu_emulator
from hopper_code import can_compile, check_machine_code

from jaxllm.kernels import quantize, quantized_matmul, tuning

needs_libtpu = pytest.mark.skipif(not RECENT or importlib.util.find_spec("libtpu") is None, reason="needs libtpu")

# format, group size, asymmetric
KINDS = [
  ("int8", None, False),
  ("int8", 64, False),
  ("int4", 32, False),
  ("int4", 128, True),
  ("int4", None, True),
  ("nf4", 64, False),
  ("fp8", None, False),
  ("int8_dynamic", None, False),
  ("fp8_dynamic", None, False),
]


def normal(seed, *shape, dtype="bfloat16"):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def weight(D, F, kind):
  return quantize(normal(0, D, F, dtype="float32") * 0.1, *kind[:2], asymmetric=kind[2])


def poisoned(q):
  """Codes past D are noise: they must not matter."""
  used = q.in_features // (2 if q.packed else 1)
  if q.padded_features == q.in_features or q.packed:  # in a packed block they share bytes with real ones
    return q
  return jax.tree.map(lambda a: a.at[:, used:].set(jnp.asarray(77, a.dtype)) if a is q.values else a, q)


def check(emulator, backend, kind, M, D, F, dtype, tolerance):
  q = weight(D, F, kind)
  x, dy = normal(1, M, D, dtype=dtype), normal(2, M, F, dtype=dtype)

  @jax.jit
  def both(x, q, dy):
    y, pull = jax.vjp(lambda x: quantized_matmul(x, q, backend=backend), x)
    return y, pull(dy)[0]

  with emulator():
    got = [np.asarray(a) for a in both(x, poisoned(q), dy)]
    again = [np.asarray(a) for a in both(x, poisoned(q), dy)]
  for a, b, want in zip(got, again, (oracle.product(x, q), oracle.gradient(dy, q))):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == x.dtype and a.shape == want.shape
    assert np.abs(a.astype(np.float64) - want).max() <= tolerance * np.abs(want).max()


@needs_emulators
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gpu(kind):
  """Two slots, so that few steps use them again."""
  from jaxllm.kernels.quantized import mosaic_gpu_backward

  with (
    mock.patch.object(mosaic_gpu_backward, "STEPS", 2),
    tuning.trying("quantized_matmul", {"steps": 2, "row_bytes": 64}),
  ):
    check(gpu_emulator, "mosaic_gpu", kind, 5, 512 if kind[0] == "int4" else 320, 136, "bfloat16", 1.5e-2)


@needs_emulators
@pytest.mark.slow
@pytest.mark.parametrize("M,F", [(1, 70), (16, 128), (70, 200), (130, 264)])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3], KINDS[5], KINDS[7]], ids=str)
def test_gpu_sizes(kind, M, F):
  check(gpu_emulator, "mosaic_gpu", kind, M, 768, F, "bfloat16", 1.5e-2)


@needs_emulators
@pytest.mark.parametrize("kind", KINDS[::4], ids=str)
def test_gpu_split_contraction(kind):
  q, x = weight(1024, 128, kind), normal(1, 9, 1024)
  tiles = dict(features=256, tokens=16, row_bytes=64, steps=2, splits=4)
  with tuning.trying("quantized_matmul", tiles), gpu_emulator():
    y = np.asarray(jax.jit(lambda x, q: quantized_matmul(x, q, backend="mosaic_gpu"))(x, q), np.float64)
  want = oracle.product(x, q)
  assert np.abs(y - want).max() <= 1.5e-2 * np.abs(want).max()


@needs_emulators
def test_gpu_gradient_of_fewer_features_than_a_step():
  q, dy = weight(256, 40, KINDS[0]), normal(1, 3, 40)
  with gpu_emulator():
    dx = np.asarray(jax.jit(lambda dy, q: quantized_matmul(dy, q, transposed=True, backend="mosaic_gpu"))(dy, q))
  want = oracle.gradient(dy, q)
  assert np.abs(np.float64(dx) - want).max() <= 1.5e-2 * np.abs(want).max()


@needs_emulators
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tpu(kind):
  check(tpu_emulator, "pallas_tpu", kind, 5, 512 if kind[0] == "int4" else 320, 136, "bfloat16", 1.5e-2)


@needs_emulators
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=str)
def test_tpu_several_tiles_in_float32(kind):
  q, x, dy = weight(512, 200, kind), normal(1, 20, 512, dtype="float32"), normal(2, 20, 200, dtype="float32")
  tiles, multiply = dict(tokens=16, features=128, inputs=256), functools.partial(quantized_matmul, backend="pallas_tpu")
  with tuning.trying("quantized_matmul", tiles), tuning.trying("quantized_gradient", tiles), tpu_emulator():
    y = jax.jit(multiply)(x, q)
    dx = jax.jit(functools.partial(multiply, transposed=True))(dy, q)
  for got, want in ((y, oracle.product(x, q)), (dx, oracle.gradient(dy, q))):
    assert np.abs(np.asarray(got, np.float64) - want).max() <= 3e-6 * np.abs(want).max()


@needs_emulators
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=str)
@pytest.mark.parametrize("emulator, backend", [(gpu_emulator, "mosaic_gpu"), (tpu_emulator, "pallas_tpu")])
def test_sums_that_go_on_are_not_rounded(emulator, backend, kind):
  """In float32, of 16-bit activations: the sum of two halves of the inputs is the whole."""
  q, x = weight(512, 128, kind), normal(1, 9, 512)
  run = jax.jit(functools.partial(quantized_matmul, backend=backend, dtype=jnp.float32))
  with emulator():
    parts = [np.asarray(run(x[:, i * 256 : (i + 1) * 256], half)) for i, half in enumerate(_halves(q))]
  assert parts[0].dtype == np.float32
  want = oracle.product(x, q)
  assert np.abs(np.float64(parts[0]) + parts[1] - want).max() <= 4e-3 * np.abs(want).max()
  # No number of 16 bits: else the low half of each would be zero.
  assert (parts[0].view(np.uint32) & 0xFFFF != 0).mean() > 0.9


def _halves(q):
  groups = q.scales.shape[0]
  for i in range(2):
    codes = q.values.shape[1] // 2
    of_groups = slice(None) if groups == 1 else slice(i * groups // 2, (i + 1) * groups // 2)
    cut = {"scales": q.scales[of_groups], "zeros": None if q.zeros is None else q.zeros[of_groups]}
    values = q.values[:, i * codes : (i + 1) * codes]
    yield dataclasses.replace(q, values=values, in_features=q.in_features // 2, **cut)


@needs_emulators
def test_nf4_polynomial_is_the_table_in_bfloat16():
  from jaxllm.kernels.quantized.mosaic_gpu_tiles import nf4

  got = np.asarray(nf4((jnp.arange(16, dtype=jnp.float32) - 7) / 8).astype(jnp.bfloat16))
  np.testing.assert_array_equal(got, oracle.NF4.astype(ml_dtypes.bfloat16))


D, F = 4096, 14336  # Llama 3 8B's feed-forward


def avals(kind, M):
  q = jax.eval_shape(lambda: quantize(jnp.zeros((D, F)), *kind[:2], asymmetric=kind[2]))
  return jax.ShapeDtypeStruct((M, D), jnp.bfloat16), q, jax.ShapeDtypeStruct((M, F), jnp.bfloat16)


def calls(backend, target):
  def forward(x, q):
    return quantized_matmul(x, q, backend=backend, target=target)

  def backward(x, q, dy):
    return jax.vjp(lambda x: forward(x, q), x)[1](dy)[0]

  return forward, backward


def some_slow(kinds, sizes, quick):
  return [
    pytest.param(kind, M, marks=() if (kind, M) in quick else pytest.mark.slow, id=f"{kind}-{M}")
    for kind in kinds
    for M in sizes
  ]


@needs_emulators
@can_compile
@pytest.mark.parametrize("kind,M", [(kind, M) for i, kind in enumerate(KINDS) for M in (1, 16, 256, 4096)[i % 2 :: 2]])
def test_h100_machine_code(kind, M):
  forward, backward = calls("mosaic_gpu", "h100")
  x, q, dy = avals(kind, M)
  of_many = M > 64 or kind == KINDS[3]  # of few tokens the gradient's kernel differs in one tile's size
  for function, inputs in ((forward, (x, q)), (backward, (x, q, dy)))[: 1 + of_many]:
    compiled = check_machine_code(function, inputs)
    # Padded or rounded activations; nothing of the weight's size.
    assert compiled.memory_analysis().temp_size_in_bytes <= 128 * 2 * F + 2 * M * D


@needs_libtpu
# Few tokens and many have tiles of their own, and so do chips with little vector memory.
@pytest.mark.parametrize("chip", ["v5e", "v7"])
@pytest.mark.parametrize(
  "kind,M", some_slow(KINDS, (16, 4096), [(KINDS[0], 16)]) + some_slow(KINDS[:4:3], (1, 256), [])
)
def test_tpus(kind, M, chip):
  from machine_code import compile_tpu

  forward, backward = calls("pallas_tpu", chip)
  x, q, dy = avals(kind, M)
  for function, inputs in ((forward, (x, q)), (backward, (x, q, dy))):
    compiled = compile_tpu(function, inputs, chip)
    assert "custom-call" in compiled.as_text()
    # Nothing of the weight's size; activations that a dynamic format rounds are one byte each.
    assert compiled.memory_analysis().temp_size_in_bytes <= D * F // 4 + M * D * ("dynamic" in kind[0])
