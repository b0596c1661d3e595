"""One optimizer step as a pure function: gradients, accumulation, clipping, guards, update."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxllm.models.config import Compute
from jaxllm.training.config import OptimizerConfig, TrainingConfig
from jaxllm.training.schedules import Schedule
from jaxllm.training.state import TrainState

Batch = PyTree
Metrics = dict[str, Float[Array, ""]]
# (params, batch, key) -> (loss_sum, weight_sum, metrics); a metric is a sum, or a (sum, weight) pair; a pair of
# vectors is the mean of its ratios, those without weight left out.
LossFn = Callable[[PyTree, Batch, PRNGKeyArray], tuple[Float[Array, ""], Float[Array, ""], dict]]


def make_train_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformationExtraArgs,
  schedule: Schedule,
  training: TrainingConfig,
  compute: Compute,
  optimizer_config: OptimizerConfig,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns `step(state, batch) -> (state, metrics)`, to be jitted with shardings and the state donated.

  `loss_fn(params, batch, key)` returns float32 scalars: the sum of the losses, the sum of their weights, and metrics
  as sums or (sum, weight) pairs. `params` are what is trained; what is frozen it knows by itself. Every sum is divided
  once, by the weight of the whole global batch, so that neither accumulation nor the number of devices changes the
  result; a batch without any weight has a zero gradient. `batch` is a pytree of arrays [B, ...]; `params` come in
  `compute.reduce_dtype`: as float32 master weights, which the model rounds where it uses them, so that their
  gradients are summed in float32, or in 16 bits, and then their gradients too. The key is derived from
  (training.seed, step, micro-batch).

  A step is bad when the loss or the gradient norm is not finite, or the loss is a spike (`spike_sigmas`
  standard deviations above its running mean). A bad step changes neither weights nor moments nor the
  statistics; `on_bad_step` "skip" counts it and goes on, "stop" sets `state.halted` for good. In float16,
  gradients that overflow while the loss is finite lower the loss scale and are skipped, and are bad only
  at a scale of 1, which cannot be lowered. With "skip", a loss that rises for good (another data mixture)
  is skipped for ever, so watch `skipped`.

  Metrics, all device scalars: loss, loss_weight (the divisor), grad_norm (before clipping, of the trained
  parameters), param_norm (after the update), learning_rate, skipped (so far), halted, in float16
  loss_scale (used in this step), and what `loss_fn` reports.
  """
  gradients = _make_gradients(loss_fn, training.accumulation, compute.reduce_dtype)
  seed = training.seed

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    scale = state.loss_scale.scale if state.loss_scale is not None else None

    grads, (loss_sum, weight_sum, sums) = gradients(state.params, batch, key, scale)

    # One scalar turns the sums into the clipped mean gradient, so the update reads each gradient once.
    factor = jnp.where(weight_sum == 0, 0, 1 / jnp.where(weight_sum == 0, 1, weight_sum))
    loss = loss_sum * factor
    if scale is not None:
      factor = factor * _static_loss_divisor(batch, training.accumulation) / scale
    grad_norm = optax.global_norm(grads) * factor
    if optimizer_config.clip_norm is not None:
      factor = factor * jnp.minimum(1, optimizer_config.clip_norm / jnp.maximum(grad_norm, 1e-30))
    grads = jax.tree.map(lambda g: g * factor, grads)

    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if scale is None:
      overflow = jnp.bool_(False)
    else:
      overflow = jnp.isfinite(loss) & ~jnp.isfinite(grad_norm) & (scale > 1)
    bad = ~finite & ~overflow
    if training.spike_sigmas is not None:
      bad |= state.loss_statistics.is_spike(loss, training.spike_sigmas) & ~overflow
    halted = state.halted | bad if training.on_bad_step == "stop" else state.halted
    applied = ~(bad | overflow | halted)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
    # The choice between old and new is elementwise, so it joins the update's pass over memory.
    choose = lambda new, old: jnp.where(applied, new, old)  # noqa: E731
    params = jax.tree.map(lambda p, u: choose((p + u).astype(p.dtype), p), state.params, updates)
    ema, decay = state.ema, training.ema_decay
    if decay is not None:
      ema = jax.tree.map(lambda e, p: choose(e + (1 - decay) * (p - e), e), ema, params)
    loss_scale = state.loss_scale
    if loss_scale is not None:
      loss_scale = loss_scale.update(overflow & ~halted, applied, optimizer_config.loss_scale_growth_steps)

    new_state = TrainState(
      step=state.step + ~halted,
      params=params,
      opt_state=jax.tree.map(choose, opt_state, state.opt_state),
      ema=ema,
      loss_scale=loss_scale,
      loss_statistics=state.loss_statistics.update(loss, applied & (weight_sum > 0)),
      skipped=state.skipped + ((bad | overflow) & ~halted),
      halted=halted,
    )
    metrics = {name: _mean(value) for name, value in sums.items()} | {
      "loss": loss,
      "loss_weight": weight_sum,
      "grad_norm": grad_norm,
      "param_norm": optax.global_norm(params),
      "learning_rate": schedule(state.step),
      "skipped": new_state.skipped,
      "halted": halted,
    }
    if scale is not None:
      metrics["loss_scale"] = scale
    return new_state, metrics

  return step


def _mean(value):
  if not isinstance(value, tuple):
    return value
  total, weight = value
  ratios = jnp.where(weight == 0, 0, total / jnp.where(weight == 0, 1, weight))
  return ratios.sum() / jnp.maximum((weight != 0).sum(), 1)


def _static_loss_divisor(batch: Batch, accumulation: int) -> float:
  """A power of two near the number of positions of a micro-batch, by which float16 losses are divided.

  Sums over a batch would overflow float16 where means do not; the true weight is known only afterwards.
  """
  positions = max(leaf.size for leaf in jax.tree.leaves(batch)) // accumulation
  return 2.0 ** math.ceil(math.log2(max(positions, 1)))


def _make_gradients(loss_fn, accumulation: int, reduce_dtype: str):
  """Returns a function that sums gradients, losses and weights over the micro-batches of one batch.

  Gradients are those of the *sum* of the losses (float16: times loss scale / `_static_loss_divisor`). Within a
  micro-batch, tokens and devices are added up in `reduce_dtype`; micro-batches in float32.
  """

  def gradients(params, batch, key, scale):
    params = jax.tree.map(lambda p: p.astype(reduce_dtype), params)

    def objective(params, micro_batch, micro_key):
      loss_sum, weight_sum, metrics = loss_fn(params, micro_batch, micro_key)
      scaled = loss_sum
      if scale is not None:
        scaled = loss_sum * (scale / _static_loss_divisor(batch, accumulation))
      return scaled, (loss_sum, weight_sum, metrics)

    differentiate = jax.grad(objective, has_aux=True)
    wide = lambda grads: jax.tree.map(lambda g: g.astype(jnp.float32), grads)  # noqa: E731

    if accumulation == 1:
      grads, sums = differentiate(params, batch, jax.random.fold_in(key, 0))
      return wide(grads), sums

    def accumulate(total, inputs):
      index, micro_batch = inputs
      grads, sums = differentiate(params, micro_batch, jax.random.fold_in(key, index))
      return jax.tree.map(jnp.add, total, wide(grads)), sums

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    micro_batches = (jnp.arange(accumulation), split_batch(batch, accumulation))
    grads, sums = jax.lax.scan(accumulate, zeros, micro_batches)
    return grads, jax.tree.map(lambda x: x.sum(0), sums)

  return gradients


def split_batch(batch: Batch, accumulation: int) -> Batch:
  """Views arrays [B, ...] as [k, B/k, ...]: row i goes to micro-batch i mod k.

  A batch is sharded in contiguous blocks of rows. Dealing rows out one by one gives each device an equal
  part of every micro-batch out of its own block, if its number of rows is divisible by k, so nothing
  moves between devices; consecutive micro-batches of contiguous rows would.
  """
  k = accumulation
  return jax.tree.map(lambda x: x.reshape(x.shape[0] // k, k, *x.shape[1:]).swapaxes(0, 1), batch)
