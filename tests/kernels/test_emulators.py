"""The emulators themselves: they must see a race, and compute what they are taught."""

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
