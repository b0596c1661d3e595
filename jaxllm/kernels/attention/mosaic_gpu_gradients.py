"""What the two gradient kernels of Hopper's attention share: their call, and a block of scores computed again."""

import dataclasses
from collections.abc import Callable

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxllm.kernels.attention import mosaic_gpu_common as common
from jaxllm.kernels.attention.options import Options
from jaxllm.kernels.hopper import LOG2E, WGMMA


def call(kernel, name, options, tiles, sizes, inputs, outputs, scratch, grid):
  """One of the kernels; its references come by name.

  "counting" is 0, 1, 2, ...: places that masks compare are read from shared memory where they are needed. Computed,
  they would not change from step to step, and the compiler keeps them in registers that the products need.
  """

  def body(*refs, **scratch):
    kernel(options, tiles, sizes, dict(zip((*inputs, *outputs), refs, strict=True)), **scratch)

  counting = max(tiles.keys, tiles.queries)
  inputs = inputs | {"counting": jnp.arange(counting, dtype=jnp.int32)}
  scratch = scratch | {
    "counting_smem": plgpu.SMEM((counting,), jnp.int32),
    "counting_ready": plgpu.Barrier(),
  }
  return plgpu.kernel(
    body,
    out_type=tuple(outputs.values()),
    scratch_types=scratch,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=tiles.warpgroups + 1,
    thread_name="warpgroup",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*inputs.values())


def mine(scratch, first, second, part):
  """A warpgroup's own blocks, for use in a loop: without the barrier the compiler works out where each wgmma finds its
  operand before the loop, and keeps these addresses in registers that the products need."""
  part = lax.optimization_barrier(jnp.int32(part))
  return scratch[first].at[part], scratch[second].at[part]


@dataclasses.dataclass(frozen=True)
class Block:
  """Scores of a block of queries and keys, or their transpose; functions give arrays of its shape when asked."""

  options: Options
  keys: tuple[int, int]  # how many there are, and of a block; the last block may be short
  maskable: bool
  masked: Array  # a scalar: whether this block needs its mask
  lse: Callable[[], Array]  # in base 2
  query_place: Callable[[], Array]
  key_place: Callable[[], Array]
  mask_row: Callable[[], dict[str, Array]]  # as `options.visible` takes it
  slope: Array | None

  @property
  def linear(self) -> bool:
    """Whether a logit is the product times a positive constant, so that lse can be taken off the product."""
    return self.options.softcap is None and self.options.alibi_slopes is None and self.options.scale > 0

  def start(self, shape) -> Float[Array, "R C"]:
    """What the accumulator of query times key starts from: -inf where hidden.

    Masks come first because all that they look at takes registers, which the products need later.
    """
    if self.linear:
      start = self.lse() * (-1.0 / (self.options.scale * LOG2E))
    else:
      start = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)
    if not self.maskable:
      return start

    def mask():
      seen = common.seen(self.options, self.query_place(), self.key_place(), *self.keys, self.mask_row())
      return jnp.where(seen, start, -jnp.inf)

    return lax.cond(self.masked, mask, lambda: start)

  def weights(self, score, second, products: int = 1) -> tuple[Float[Array, "R C"], Float[Array, "R C"]]:
    """p, and w such that ds = w * (dp - delta), from the accumulator `score` whose product is under way.

    second: starts `products` further products. They run beside the exponentials where the registers suffice, which
    they do not for what a soft cap or slopes need; then they start at the end.
    """
    if self.linear:
      second()
      p = jnp.exp2(plgpu.wgmma_accumulator_load(score, wait_n=products) * (self.options.scale * LOG2E))
      return p, p
    raw = score[...]
    values, factor, capped = common.logits(self.options, raw, self.query_place, self.key_place, self.slope)
    p = jnp.exp2(values * factor - self.lse())
    if self.maskable:
      p = jnp.where(raw == -jnp.inf, 0.0, p)
    w = p if capped is None else p * (1.0 - capped * capped)
    second()
    return p, w
