"""Learning-rate schedules: linear warm-up, then one of five shapes."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.training.config import OptimizerConfig

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def make_schedule(config: OptimizerConfig, total_steps: int) -> Schedule:
  """Returns the learning rate as a function of the optimizer step, which counts from 0.

  Step s < W = warmup_steps takes peak (s + 1) / (W + 1), so no step is wasted at zero; step W takes the
  peak. After it, with r = final_lr_fraction and p growing linearly from 0 to 1 at step total_steps - 1:

    cosine    peak (r + (1 - r) (1 + cos(pi p)) / 2)    Loshchilov & Hutter, arXiv 1608.03983
    linear    peak (r + (1 - r) (1 - p))
    wsd       peak, then peak (r + (1 - r) (1 - sqrt(p))) over the last decay_fraction of all steps
              (warmup-stable-decay with the "1-sqrt" cooldown of Hägele et al., arXiv 2405.18392)
    rsqrt     peak sqrt((W + 1) / (s + 1))              Vaswani et al., arXiv 1706.03762, section 5.3
    constant  peak

  A run that is over before its warm-up never leaves the ramp, and one with no step left after the peak
  (a single step, for instance) does not decay. Steps past the end keep the last value.
  """
  peak, warmup, last = config.learning_rate, config.warmup_steps, total_steps - 1
  decay_start = warmup
  if config.schedule == "wsd":
    decay_start = max(warmup, last - round(config.decay_fraction * total_steps))
  decay_steps = max(last - decay_start, 0)

  def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
    s = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((s - decay_start) / decay_steps, 0, 1) if decay_steps else jnp.zeros_like(s)
    match config.schedule:
      case "cosine":
        shape = (1 + jnp.cos(math.pi * progress)) / 2
      case "linear":
        shape = 1 - progress
      case "wsd":
        shape = 1 - jnp.sqrt(progress)
      case "rsqrt":
        shape = jnp.sqrt((warmup + 1) / (jnp.clip(s, warmup, max(last, warmup)) + 1))
      case "constant":
        shape = jnp.ones_like(s)
    if config.schedule in ("cosine", "linear", "wsd"):
      shape = config.final_lr_fraction + (1 - config.final_lr_fraction) * shape
    return peak * jnp.where(s < warmup, (s + 1) / (warmup + 1), shape)

  return schedule
