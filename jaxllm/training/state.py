"""Everything a training run must remember between two optimizer steps, as one pytree."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxllm.models.config import Compute
from jaxllm.training.config import OptimizerConfig, TrainingConfig
from jaxllm.training.precision import LossScale

SPIKE_DECAY = 0.99  # the loss statistics remember about the last hundred steps
SPIKE_WARMUP = 50  # good steps before a loss can count as a spike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossStatistics:
  """Exponentially weighted mean and variance of the losses of good steps.

  The weight of the loss i steps ago is SPIKE_DECAY^i, normalised to sum to 1 (Adam's bias correction).
  """

  mean: Float[Array, ""]
  variance: Float[Array, ""]
  count: Int[Array, ""]  # losses seen

  @classmethod
  def create(cls) -> "LossStatistics":
    return cls(jnp.float32(0), jnp.float32(0), jnp.int32(0))

  def update(self, loss: Float[Array, ""], use: Bool[Array, ""]) -> "LossStatistics":
    """Takes `loss` in where `use` holds (West 1979, with the weights normalised at every step)."""
    count = self.count + use
    # (1 - d) / (1 - d^n), exactly 1 for the first loss.
    log_decay = jnp.log(jnp.float32(SPIKE_DECAY))
    weight = jnp.where(use, jnp.expm1(log_decay) / jnp.expm1(log_decay * jnp.maximum(count, 1)), 0)
    difference = jnp.where(use, loss - self.mean, 0)
    mean = self.mean + weight * difference
    variance = (1 - weight) * (self.variance + weight * difference**2)
    return LossStatistics(mean, variance, count)

  def is_spike(self, loss: Float[Array, ""], sigmas: float) -> Bool[Array, ""]:
    return (self.count >= SPIKE_WARMUP) & (loss > self.mean + sigmas * jnp.sqrt(self.variance))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state that a train step maps to the next one.

  `step` counts the batches consumed: the batch with index `step` comes next, and both the learning rate
  and the random keys derive from it, so a run resumed from a checkpoint repeats the uninterrupted one bit
  for bit. A skipped step counts, because its batch is gone. Once `halted`, nothing changes any more:
  the state stays the last good one, whose `step` is the index of the batch that was bad.
  """

  step: Int[Array, ""]
  params: PyTree  # float32 master weights of what is trained, None for what is not
  opt_state: PyTree
  ema: PyTree | None  # exponential moving average of params
  loss_scale: LossScale | None  # float16 only
  loss_statistics: LossStatistics
  skipped: Int[Array, ""]  # steps consumed without an update: bad ones and float16 overflows
  halted: Bool[Array, ""]  # a bad step came with on_bad_step = "stop"


def init_state(
  params: PyTree,
  optimizer: optax.GradientTransformation,
  training: TrainingConfig,
  compute: Compute,
  optimizer_config: OptimizerConfig,
) -> TrainState:
  """The state before the first step. Pure: jit it with `state_shardings` to create it sharded."""
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
    # A copy: a donated state must not hold one buffer twice.
    ema=jax.tree.map(jnp.copy, params) if training.ema_decay is not None else None,
    loss_scale=LossScale.create(optimizer_config.loss_scale) if compute.dtype == "float16" else None,
    loss_statistics=LossStatistics.create(),
    skipped=jnp.int32(0),
    halted=jnp.bool_(False),
  )
