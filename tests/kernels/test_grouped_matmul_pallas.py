"""The grouped kernels for TPU and Hopper: in their emulators against float64, and as machine code."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulators import gpu_emulator, needs_emulators, tpu_emulator
from grouped_oracle import case, check, run, same
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import grouped_matmul

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import machine_code

pytestmark = needs_emulators
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None
  or machine_code.find_tool("ptxas") is None
  or machine_code.find_tool("nvdisasm") is None,
  reason="machine code of H100 needs jax-cuda13-plugin, ptxas and nvdisasm",
)
# Mixtral 8x7B's and Qwen3-30B-A3B's experts: rows, experts, width, inner width
REAL = {"mixtral": (16384, 8, 4096, 14336), "qwen3": (32768, 128, 2048, 768)}


def tpu(rows=32, columns=128, part=16, **inner):
  return dict(rows=rows, columns=columns, part=part, **inner)


def hopper(columns=128, stages=2, strip=2, blocks=2):
  return dict(columns=columns, stages=stages, strip=strip, blocks=blocks)


# ---------------------------------------------------------------- TPU

# (sizes, rows, D, F, tiles): straddled tiles, empty groups, tails, one group with all rows, none with any
TPU = {
  "ragged": ([13, 0, 51, 7], 80, 256, 128, tpu(inner=128)),
  "short last tile, columns past the end": ([13, 0, 51, 7], 75, 128, 200, tpu()),
  "whole tiles": ([32, 0, 64], 128, 128, 128, tpu()),
  "one group": ([0, 0, 70, 0], 70, 128, 128, tpu()),
  "no rows": ([0, 0], 20, 128, 128, tpu(rows=20, part=20)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", TPU)
def test_tpu(name, dtype):
  sizes, M, D, F, tiles = TPU[name]
  with tpu_emulator():
    check(case(sizes, M, D, F, dtype), backend="pallas_tpu", tiles=tiles)


def test_tpu_default_tiles_twice_the_same_and_nan_stays():
  x, w, sizes, dy = case([21, 0, 30], 56, 128, 128)
  with tpu_emulator():
    clean = check((x, w, sizes, dy), backend="pallas_tpu", target="v5e")
    same(run(x, w, sizes, dy, backend="pallas_tpu", target="v5e"), clean)
    y, dx, dweights = run(x.at[20].set(jnp.nan), w, sizes, dy, backend="pallas_tpu", target="v5e")
  assert np.isnan(y[20]).all() and np.isnan(dweights[0]).all()
  same((y[:20], y[21:], dx, dweights[1:]), (clean[0][:20], clean[0][21:], clean[1], clean[2][1:]))


@settings(max_examples=60, deadline=None)
@given(
  cuts=st.lists(st.integers(0, 300), min_size=8, max_size=8),
  empty_groups=st.sets(st.integers(0, 7)),
  M=st.sampled_from([300, 333]),
  rows=st.sampled_from([8, 32, 128]),
)
def test_tpu_visits(cuts, empty_groups, M, rows):
  """Every row is visited once with its group, a tile's visits follow each other, and the list always suffices."""
  from jaxllm.kernels.grouped.pallas_tpu import _visits

  sizes = np.diff([0, *sorted(cuts)])
  sizes[list(empty_groups)] = 0
  E, visits = len(sizes), jax.jit(_visits, static_argnums=(1, 2, 3))
  owner = np.repeat(np.arange(E + 1), [*sizes, M - sum(sizes)])
  for empty in (False, True):
    group, tile, starts, ends, total = (np.asarray(a) for a in visits(jnp.array(sizes, jnp.int32), M, rows, empty))
    assert total[0] <= len(group) and (group[total[0] :] == group[-1]).all() and (tile[total[0] :] == tile[-1]).all()
    group, tile = group[: total[0]], tile[: total[0]]
    seen = np.full(M, -1)
    for g, t in zip(group, tile):
      span = np.arange(max(starts[g], t * rows), min(ends[g], t * rows + rows, M))
      assert (seen[span] == -1).all() and 0 <= t * rows < M
      seen[span] = g
    if empty:  # the gradient: every group once in a row, with rows or without
      assert (seen[: sum(sizes)] == owner[: sum(sizes)]).all()
      assert [g for i, g in enumerate(group) if i == 0 or group[i - 1] != g] == list(range(E))
    else:
      assert (seen == owner).all() and (np.diff(tile) >= 0).all()


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "v7", None])
def test_tpu_tiles_fit_the_shapes(chip):
  from jaxllm.kernels.grouped import pallas_tpu

  for M, E, D, F in (*REAL.values(), (24, 8, 4096, 14336), (512, 4, 200, 72)):
    for dtype in (jnp.float32, jnp.bfloat16):
      for K, N in ((D, F), (F, D)):
        t = pallas_tpu._tiles(M, E, K, N, dtype, chip)
        assert K % t.inner == 0 and t.rows % t.part == 0 and t.rows <= M and t.columns <= N
      t = pallas_tpu._gradient_tiles(M, E, D, F, dtype, chip)
      assert t.rows % t.part == 0 and t.rows <= M


def compile_all(compiler, name, dtype, backend, chip):
  M, E, D, F = REAL[name]
  shapes = ((M, D), (E, D, F), (E,), (M, F))
  avals = tuple(jax.ShapeDtypeStruct(s, jnp.int32 if len(s) == 1 else dtype) for s in shapes)
  return compiler(lambda *a: run(*a, backend=backend, target=chip), avals, chip)


def check_tpu_compiles(name, chip, dtype=jnp.bfloat16):
  program = compile_all(machine_code.compile_tpu, name, dtype, "pallas_tpu", chip)
  assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3
  assert program.memory_analysis().temp_size_in_bytes < 4 << 20  # lists of visits: no copy of rows or matrices


@needs_libtpu
def test_tpu_compiles():
  check_tpu_compiles("qwen3", "v5e")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name,chip", [*(("mixtral", chip) for chip in ("v5e", "v5p", "v6e", "v7")), ("qwen3", "v7")])
def test_tpu_compiles_for_every_chip(name, chip):
  check_tpu_compiles(name, chip)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v7"])  # with much vector memory, and with little
def test_tpu_compiles_in_float32(chip):
  check_tpu_compiles("qwen3", chip, jnp.float32)


# ---------------------------------------------------------------- Hopper

# (sizes, rows, D, F, tiles): tiles that start inside 8 rows, only one warpgroup's rows, more columns than a tile
GPU = {
  "ragged": ([13, 0, 51, 7], 80, 64, 128, hopper()),
  "several tiles of a group, rows no multiple of 8": ([140, 3, 0, 30], 189, 64, 64, hopper()),
  "columns past the end, steps, strips": ([70, 66], 150, 128, 192, hopper(strip=1, stages=3)),
  "one group": ([0, 128, 0], 128, 64, 64, hopper(blocks=1)),
  "no rows": ([0, 0], 20, 64, 64, hopper()),
}


@pytest.mark.parametrize("name", GPU)
def test_gpu(name):
  sizes, M, D, F, tiles = GPU[name]
  with gpu_emulator():
    check(case(sizes, M, D, F, jnp.bfloat16), backend="mosaic_gpu", tiles=tiles)


def test_gpu_float16_twice_the_same_and_nan_stays():
  x, w, sizes, dy = case([21, 0, 30], 56, 64, 64, jnp.float16)
  options = dict(backend="mosaic_gpu", tiles=hopper())
  with gpu_emulator():
    clean = check((x, w, sizes, dy), **options)
    same(run(x, w, sizes, dy, **options), clean)
    y, dx, dweights = run(x.at[20].set(jnp.nan), w, sizes, dy, **options)
  assert np.isnan(np.float32(y[20])).all() and np.isnan(np.float32(dweights[0])).all()
  same((y[:20], y[21:], dx, dweights[1:]), (clean[0][:20], clean[0][21:], clean[1], clean[2][1:]))


@settings(max_examples=60, deadline=None)
@given(
  cuts=st.lists(st.integers(0, 700), min_size=8, max_size=8),
  empty_groups=st.sets(st.integers(0, 7)),
  M=st.sampled_from([700, 733]),
  strip=st.integers(1, 5),
  across=st.integers(1, 4),
)
def test_gpu_tiles(cuts, empty_groups, M, strip, across):
  """Every row is in one tile, of its group; tiles start at multiples of 8, as copies must; all are walked over once."""
  from jaxllm.kernels.grouped.mosaic_gpu import _place, row_tiles

  sizes = np.diff([0, *sorted(cuts)])
  sizes[list(empty_groups)] = 0
  tiles = jax.jit(row_tiles, static_argnums=(1, 2))
  table, count = (np.asarray(a) for a in tiles(jnp.array(sizes, jnp.int32), M, 128))
  assert count[0] <= len(table)
  seen = np.full(M, -1)
  for group, row, low, high in table[: count[0]]:
    assert row % 8 == 0 and 0 <= low < high <= 128
    assert (seen[row + low : row + high] == -1).all()
    seen[row + low : row + high] = group
  assert (seen == np.repeat(np.arange(len(sizes) + 1), [*sizes, M - sum(sizes)])).all()
  down = int(count[0])
  index = jnp.arange(64 * 4)  # more than there are, so that one program does
  place = jax.jit(jax.vmap(_place, (0, None, None, None)))
  places = np.stack(place(index, *(jnp.int32(n) for n in (down, across, strip))), 1)[: down * across]
  assert sorted(map(tuple, places)) == [(i, j) for i in range(down) for j in range(across)]


@pytest.mark.parametrize(
  "dtype, shape, target, message",
  [
    (jnp.float32, (2, 64, 64), "h100", "bfloat16 or float16, not float32"),
    (jnp.bfloat16, (2, 64, 72), "h100", "multiples of 64"),
    (jnp.bfloat16, (2, 64, 64), "v5e", "no backend 'mosaic_gpu' on v5e"),
  ],
)
def test_gpu_refuses(dtype, shape, target, message):
  with pytest.raises(ConfigError, match=message):
    x = jnp.ones((8, shape[1]), dtype)
    grouped_matmul(x, jnp.ones(shape, dtype), jnp.zeros(2, jnp.int32), backend="mosaic_gpu", target=target)


@needs_cuda
@pytest.mark.parametrize("name", REAL)
def test_gpu_machine_code(name):
  """The product, x's gradient and the weights' gradient."""
  program, kernels = compile_all(machine_code.compile_gpu, name, jnp.bfloat16, "mosaic_gpu", "h100")
  assert len(kernels) == 3
  for kernel in kernels:
    assert kernel.tensor_core and kernel.tma and not kernel.spill_bytes and not kernel.local, dataclasses.asdict(kernel)
    assert not kernel.serialized
    assert kernel.shared_bytes <= machine_code.SHARED_MEMORY_LIMIT
  assert program.memory_analysis().temp_size_in_bytes < 1 << 20
