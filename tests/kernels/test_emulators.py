"""The emulators themselves: they must see a race, and compute what they are taught."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulators import gpu_emulator, needs_emulators, tpu_emulator

pytestmark = needs_emulators


def gpu_copy(x, wait):
  import jax.experimental.pallas.mosaic_gpu as plgpu

  def kernel(x_gmem, out_gmem, smem, barrier):
    plgpu.copy_gmem_to_smem(x_gmem, smem, barrier)
    if wait:
      plgpu.barrier_wait(barrier)
    out_gmem[...] = smem[...] * 2

  call = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
    scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
  )
  return call(x)


def test_gpu_race():
  x = jnp.arange(128, dtype=jnp.float32)
  with gpu_emulator():
    np.testing.assert_array_equal(gpu_copy(x, wait=True), 2 * x)
  with pytest.raises(AssertionError, match="race"), gpu_emulator():
    gpu_copy(x, wait=False)
  with gpu_emulator():  # and is itself again
    np.testing.assert_array_equal(gpu_copy(x, wait=True), 2 * x)


def test_gpu_accumulator_that_starts_from_a_value_and_a_left_operand_in_registers():
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

  def kernel(a_gmem, b_gmem, out_gmem, smem, barrier):
    plgpu.copy_gmem_to_smem(b_gmem, smem, barrier)
    plgpu.barrier_wait(barrier)
    start = plgpu.layout_cast(jnp.full((64, 64), 3.0, jnp.float32), plgpu.Layout.WGMMA)

    def multiply(acc):
      plgpu.wgmma(acc, plgpu.load(a_gmem, layout=plgpu.Layout.WGMMA, optimized=False), smem)

    out_gmem[...] = pl.run_state(multiply)(plgpu.ACC.init(start))

  a, b = (jax.random.normal(jax.random.key(i), (64, 64), jnp.bfloat16) for i in range(2))
  tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  with gpu_emulator():
    got = plgpu.kernel(
      kernel,
      out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
      scratch_types=[plgpu.SMEM(b.shape, b.dtype, transforms=tiles), plgpu.Barrier()],
    )(a, b)
  np.testing.assert_allclose(got, 3 + np.float64(a) @ np.float64(b), atol=1e-4)


TILES = 8, 64


def tiled(shape):
  """16-bit operands of wgmma in shared memory."""
  import jax.experimental.pallas.mosaic_gpu as plgpu

  return plgpu.SMEM(shape, jnp.bfloat16, transforms=(plgpu.TilingTransform(TILES), plgpu.SwizzleTransform(128)))


def random(*shape):
  return jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16)


def gpu_pipeline(x, steps, slots, wait, late, before_load=0):
  """sum of x[i] @ x[i]. A step waits for all products but `wait` and hands back the slot `late` steps old.

  before_load: products that may be under way when the sum is read.
  """
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

  def kernel(x_gmem, out_gmem, smem, ready, done):
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == 1)
    def _():
      for step in range(steps):
        if step >= slots:
          plgpu.barrier_wait(done.at[step % slots])
        plgpu.copy_gmem_to_smem(x_gmem.at[step], smem.at[step % slots], ready.at[step % slots])

    @pl.when(warpgroup == 0)
    def _():
      def products(acc):
        for step in range(steps):
          slot = step % slots
          plgpu.barrier_wait(ready.at[slot])
          plgpu.wgmma(acc, smem.at[slot], smem.at[slot])
          plgpu.wgmma_wait(wait)
          if step >= late:
            plgpu.barrier_arrive(done.at[(step - late) % slots])
        return plgpu.wgmma_accumulator_load(acc, wait_n=before_load)

      out_gmem[...] = pl.run_scoped(products, plgpu.ACC((64, 64), jnp.float32))

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
    scratch_types=[
      tiled((slots, 64, 64)),
      plgpu.Barrier(num_barriers=slots),
      plgpu.Barrier(num_barriers=slots),
    ],
    num_threads=2,
    thread_name="warpgroup",
  )(x)


@pytest.mark.parametrize(("wait", "late"), [(0, 0), (1, 1), (0, 1), (2, 2)])
def test_gpu_slots_go_back_after_the_product_that_reads_them(wait, late):
  x = random(5, 64, 64)
  with gpu_emulator():
    got = gpu_pipeline(x, 5, 3, wait, late)
  np.testing.assert_allclose(got, (np.float64(x) @ np.float64(x)).sum(0), atol=1e-3)


@pytest.mark.parametrize(("wait", "late"), [(1, 0), (2, 1), (3, 0)])
def test_gpu_slot_that_goes_back_too_early(wait, late):
  with pytest.raises(AssertionError, match="race"), gpu_emulator():
    jax.block_until_ready(gpu_pipeline(random(5, 64, 64), 5, 3, wait, late))


def test_gpu_accumulator_read_too_early():
  with pytest.raises(Exception, match="accumulator is read while a product"), gpu_emulator():
    jax.block_until_ready(gpu_pipeline(random(2, 64, 64), 2, 2, 1, 1, before_load=1))


@pytest.mark.parametrize("what", ["overwritten", "dropped"])
def test_gpu_accumulator_not_awaited(what):
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

  def kernel(x_gmem, out_gmem, smem, barrier):
    plgpu.copy_gmem_to_smem(x_gmem, smem, barrier)
    plgpu.barrier_wait(barrier)

    def product(acc):
      plgpu.wgmma(acc, smem, smem)
      if what == "overwritten":
        acc[...] = plgpu.layout_cast(jnp.zeros((64, 64), jnp.float32), plgpu.Layout.WGMMA)

    pl.run_scoped(product, plgpu.ACC((64, 64), jnp.float32))
    plgpu.wgmma_wait(0)

  call = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
    scratch_types=[tiled((64, 64)), plgpu.Barrier()],
  )
  with pytest.raises(Exception, match=f"accumulator is {what} while a product"), gpu_emulator():
    jax.block_until_ready(call(random(64, 64)))


def gpu_products_of_written(x, commits, order):
  """(x + 1) @ (x + 1) twice; threads write the operand, and again for the second product.

  commits: whether what they wrote is committed before the first product, before the second, and before out leaves.
  order: "wait" for the first product before its operand is written again, or "early".
  """
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

  def commit(index):
    if commits[index]:
      plgpu.commit_smem()

  def kernel(x_gmem, out_gmem, smem, out_smem):
    value = plgpu.load(x_gmem, layout=plgpu.Layout.WGMMA, optimized=False)
    smem[...] = value + 1
    commit(0)

    def products(acc):
      plgpu.wgmma(acc, smem, smem)
      if order == "wait":
        plgpu.wgmma_wait(0)
      smem[...] = value + 1
      commit(1)
      plgpu.wgmma(acc, smem, smem)
      return acc[...]

    out_smem[...] = pl.run_scoped(products, plgpu.ACC((64, 64), jnp.float32))
    commit(2)
    plgpu.copy_smem_to_gmem(out_smem, out_gmem)
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
    scratch_types=[tiled((64, 64)), plgpu.SMEM((64, 64), jnp.float32)],
  )(x)


def test_gpu_what_threads_write_is_committed():
  x = random(64, 64)
  with gpu_emulator():
    got = gpu_products_of_written(x, (True, True, True), "wait")
  one = np.float64(x + 1)
  np.testing.assert_allclose(got, 2 * one @ one, atol=1e-3)


@pytest.mark.parametrize(
  ("commits", "order"),
  [((False, True, True), "wait"), ((True, False, True), "wait"), ((True, True, False), "wait"), ((True,) * 3, "early")],
)
def test_gpu_what_threads_write_without_a_commit_or_under_a_product(commits, order):
  with pytest.raises(AssertionError, match="race"), gpu_emulator():
    jax.block_until_ready(gpu_products_of_written(random(64, 64), commits, order))


def gpu_stores(x, wait):
  """Rows of x leave through one buffer, which is overwritten once all copies of it but `wait` have read it."""
  import jax.experimental.pallas.mosaic_gpu as plgpu

  def kernel(x_gmem, out_gmem, smem):
    for i in range(3):
      if i:
        plgpu.wait_smem_to_gmem(wait, wait_read_only=True)
      smem[...] = x_gmem[i]
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(smem, out_gmem.at[i])
    plgpu.wait_smem_to_gmem(0)

  out = jax.ShapeDtypeStruct(x.shape, x.dtype)
  return plgpu.kernel(kernel, out_type=out, scratch_types=[plgpu.SMEM(x.shape[1:], x.dtype)])(x)


def test_gpu_source_of_a_store_is_not_overwritten_before_it_is_read():
  x = jnp.arange(3 * 128, dtype=jnp.float32).reshape(3, 128)
  with gpu_emulator():
    np.testing.assert_array_equal(gpu_stores(x, 0), x)
  with pytest.raises(AssertionError, match="race"), gpu_emulator():
    jax.block_until_ready(gpu_stores(x, 1))


@pytest.mark.parametrize("answers", [True, False])
def test_gpu_phase_of_a_barrier_that_somebody_may_miss(answers):
  """One warpgroup arrives twice; without an answer to the first time the other one may see neither."""
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

  def kernel(x_gmem, out_gmem, there, back):
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup == 0)
    def _():
      plgpu.barrier_arrive(there)
      if answers:
        plgpu.barrier_wait(back)
      plgpu.barrier_arrive(there)

    @pl.when(warpgroup == 1)
    def _():
      plgpu.barrier_wait(there)
      plgpu.barrier_arrive(back)
      plgpu.barrier_wait(there)
      out_gmem[...] = x_gmem[...]

  x = jnp.zeros(128)
  call = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
    scratch_types=[plgpu.Barrier(), plgpu.Barrier()],
    num_threads=2,
    thread_name="warpgroup",
  )
  if answers:
    with gpu_emulator():
      call(x)
  else:
    with pytest.raises(Exception, match="phase|observed|already"), gpu_emulator():
      jax.block_until_ready(call(x))


@pytest.mark.parametrize("apart", [True, False])
def test_gpu_blocks_that_write_to_one_place(apart):
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

  def kernel(x_gmem, out_gmem):
    rows = pl.ds(jax.lax.axis_index("block") * (64 if apart else 63), 64)
    out_gmem[rows] = x_gmem[rows]

  x = jnp.ones((128, 128))
  call = plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(2,), grid_names=("block",))
  with contextlib.nullcontext() if apart else pytest.raises(AssertionError, match="race"), gpu_emulator():
    jax.block_until_ready(call(x))


def test_tpu_race():
  import jax.experimental.pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  def kernel(x, out, scratch, semaphore, *, wait):
    copy = pltpu.make_async_copy(x, scratch, semaphore)
    copy.start()
    if wait:
      copy.wait()
    out[...] = scratch[...] * 2
    if not wait:
      copy.wait()

  def run(x, wait):
    return pl.pallas_call(
      lambda *refs: kernel(*refs, wait=wait),
      out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
      in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
      scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    )(x)

  x = jnp.arange(1024.0).reshape(8, 128)
  with tpu_emulator():
    np.testing.assert_array_equal(run(x, True), 2 * x)
  with pytest.raises(AssertionError, match="race"), tpu_emulator():
    run(x, False)
