"""Mixture of experts: routing, the experts' products, and the losses that keep the router balanced."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxllm.kernels.matmul import matmul
from jaxllm.models.config import MLPS, Compute, ModelConfig, MoEConfig
from jaxllm.models.initializers import matrix_init
from jaxllm.models.linear import Linear, parameter
from jaxllm.models.mlp import ACTIVATIONS, MLP, gated
from jaxllm.models.weights import dense, grouped, part_axes, ready
from jaxllm.parallel.kernels import by_experts
from jaxllm.parallel.sharding import constrain, ways_here

# Weights: gate [E, D, F] (None: not gated), up [E, D, F], down [E, F, D]; then any biases [E, F] of the first two.
Matrices = tuple[Any, ...]
MATRIX_AXES = (
  *(("expert", "embed", "mlp"), ("expert", "embed", "mlp"), ("expert", "mlp", "embed")),
  *(("expert", "mlp"), ("expert", "mlp")),
)
RouterLosses = dict[str, Float[Array, ""]]  # load_balance, z, dropped


class ExpertLinear(nnx.Module):
  """A matrix [I, O] for each of E experts, and a vector [O] where they have biases."""

  def __init__(self, experts, inputs, outputs, axes, *, init, bias, rngs):
    self.weight = parameter(rngs, (experts, inputs, outputs), ("expert", *axes), init)
    own = ("expert", axes[1])
    self.bias = parameter(rngs, (experts, outputs), own, nnx.initializers.zeros) if bias else None


class MoE(nnx.Module):
  """Each token through `top_k` of `num_experts` feed-forward blocks, and through the shared one."""

  def __init__(self, c: ModelConfig, compute: Compute, *, rngs):
    self.m = m = c.moe
    self.compute = compute
    self.activation, has_gate = MLPS[c.mlp]
    matrix = functools.partial(ExpertLinear, m.num_experts, bias=m.bias, rngs=rngs)
    D, F, inner = c.embed_dim, m.mlp_dim, matrix_init(c, c.embed_dim)
    self.router = Linear(D, m.num_experts, ("embed", None), init=inner, bias=m.bias, compute=compute, rngs=rngs)
    if m.correction_bias:
      self.correction_bias = parameter(rngs, (m.num_experts,), (None,), nnx.initializers.zeros)
    self.gate = matrix(D, F, ("embed", "mlp"), init=inner) if has_gate else None
    self.up = matrix(D, F, ("embed", "mlp"), init=inner)
    self.down = matrix(F, D, ("mlp", "embed"), init=matrix_init(c, F, residual=True))
    self.shared = MLP(c, compute, m.shared_mlp_dim, rngs=rngs) if m.shared_mlp_dim else None

  def __call__(
    self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, *, drop: bool
  ) -> tuple[Float[Array, "B T D"], RouterLosses]:
    """The block's output and the router's losses; padding (segment 0) takes no expert's room and no part in them.

    Args:
      drop: whether the capacity, if there is one, applies.
    """
    real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0
    logits = self.router(x.astype(jnp.float32))
    bias = dense(self.correction_bias.get_value(), jnp.float32) if self.m.correction_bias else None
    weights, experts, scores = route(self.m, logits, bias)
    layers = (self.gate, self.up, self.down)
    matrices = tuple(None if layer is None else layer.weight.get_value() for layer in layers)
    feed = functools.partial(_feed_forward, self.activation)
    dropped = jnp.zeros((), jnp.float32)
    if drop and self.m.capacity_factor is not None:
      y, dropped = with_capacity(feed, x, weights, experts, real, matrices, self.m.capacity_factor)
    elif self.m.bias:
      biases = tuple(None if layer is None else dense(layer.bias.get_value(), jnp.float32) for layer in layers)
      y = dropless(feed, x, weights, experts, (*matrices, *biases[:2]), self.compute)
      # Of the sum once, wherever the parts of an expert's last product are.
      share = (jax.nn.one_hot(experts, self.m.num_experts) * weights[..., None]).sum(-2)
      y = y + (share @ biases[2]).astype(y.dtype)
    else:
      y = dropless(feed, x, weights, experts, matrices, self.compute)
    if self.shared is not None:
      y = y + self.shared(x)
    return y, router_losses(logits, scores, experts, real) | {"dropped": dropped}


def route(
  m: MoEConfig, logits: Float[Array, "*B E"], bias: Float[Array, " E"] | None = None
) -> tuple[Float[Array, "*B k"], Int[Array, "*B k"], Float[Array, "*B E"]]:
  """Which experts each token goes to: (weights, experts, all scores), in float32.

  `bias` moves the choice and not the weights (DeepSeek-V3, section 2.1.2).
  """
  scores = jax.nn.softmax(logits) if m.scoring == "softmax" else jax.nn.sigmoid(logits)
  choice = scores if bias is None else scores + bias
  if m.num_groups > 1:
    groups = choice.reshape(*choice.shape[:-1], m.num_groups, -1)
    best = jax.lax.top_k(groups, 1 if m.scoring == "softmax" else 2)[0].sum(-1)
    kept = jax.nn.one_hot(jax.lax.top_k(best, m.top_groups)[1], m.num_groups).sum(-2) > 0
    choice = jnp.where(kept[..., None], groups, -jnp.inf).reshape(choice.shape)
  experts = jax.lax.top_k(choice, m.top_k)[1]
  weights = jnp.take_along_axis(scores, experts, axis=-1)
  if m.normalize:
    weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
  return m.scale * weights, experts, scores


def router_losses(
  logits: Float[Array, "B T E"],
  scores: Float[Array, "B T E"],
  experts: Int[Array, "B T k"],
  real: Bool[Array, "B T"],
) -> RouterLosses:
  """Two losses of one layer, over the tokens that are real.

  load_balance: E sum_e f_e P_e, with f_e the tokens sent to expert e per token and P_e its mean share of the
  scores; k when all experts are used alike (Switch, arXiv 2101.03961, equations 4-6, for k choices as
  Mixtral's code has it). z: mean of log(sum exp(logits)) ** 2 (ST-MoE, arXiv 2202.08906, equation 5).
  """
  E = logits.shape[-1]
  mask = real.astype(jnp.float32)[..., None]
  count = jnp.maximum(mask.sum(), 1)
  sent = jnp.zeros(E).at[experts].add(jnp.broadcast_to(mask, experts.shape)) / count
  share = (mask * scores / scores.sum(-1, keepdims=True)).sum((0, 1)) / count
  z = (mask[..., 0] * jax.nn.logsumexp(logits, axis=-1) ** 2).sum() / count
  return {"load_balance": E * (sent * share).sum(), "z": z}


def _feed_forward(activation, multiply, x, matrices: Matrices):
  """The experts' gated or plain blocks; `multiply` takes rows to their experts' matrices, whose dimension 1 or 2 is
  `embed`, and adds their biases."""
  gate, up, down, *biases = matrices
  gate_bias, up_bias = biases or (None, None)
  hidden = checkpoint_name(multiply(x, up, up_bias, embed=1), "mlp_up")
  if gate is not None:
    hidden = gated(activation, checkpoint_name(multiply(x, gate, gate_bias, embed=1), "mlp_gate"), hidden)
  else:
    hidden = ACTIVATIONS[activation](hidden)
  return multiply(hidden, down, embed=2)


def dropless(
  feed, x: Float[Array, "B T D"], weights, experts, matrices: Matrices, compute: Compute = Compute()
) -> Float[Array, "B T D"]:
  """Every token through all its experts: rows sorted by expert, one grouped product for each matrix."""
  matrices = tuple(map(ready, matrices))  # type: ignore[assignment]
  axes = tuple(w if w is None else part_axes(w, names, ways_here) for w, names in zip(matrices, MATRIX_AXES))
  return by_experts(functools.partial(_dropless, feed, compute), x, weights, experts, matrices, axes)


def _dropless(feed, compute, x, weights, experts, matrices, first, split):
  """What the experts from `first` on, whose matrices these are, add to each token.

  split: the mesh axes over which the matrices' `embed` dimension is.
  """
  k, E = experts.shape[-1], matrices[1].shape[0]
  rows = x.reshape(-1, x.shape[-1])
  own = experts.reshape(-1) - first
  own = jnp.where((own >= 0) & (own < E), own, E)  # other devices' experts sort to the end
  order = jnp.argsort(own, stable=True)
  sizes = jnp.bincount(own, length=E + 1)[:E]

  def product(rows, matrices, bias=None, *, embed):
    y = grouped(rows, matrices, sizes, compute, (split, embed) if split else None)
    return y if bias is None else (y.astype(jnp.float32) + bias[jnp.minimum(own[order], E - 1)]).astype(y.dtype)

  y = feed(product, rows[order // k], matrices)
  weight = weights.reshape(-1)[order].astype(y.dtype)
  y = jnp.where((own[order] < E)[:, None], weight[:, None] * y, 0)
  y = y[jnp.argsort(order)].reshape(-1, k, x.shape[-1]).sum(1)
  return y.reshape(x.shape)


def with_capacity(
  feed,
  x: Float[Array, "B T D"],
  weights: Float[Array, "B T k"],
  experts: Int[Array, "B T k"],
  real: Bool[Array, "B T"],
  matrices: Matrices,
  factor: float,
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
  """Each expert takes at most factor * T k / E tokens of a sequence, the first that come.

  So what is dropped depends on earlier tokens only, and neither on the batch nor on the mesh
  (GShard, arXiv 2006.16668, with one group a sequence). Returns the dropped share of choices too.
  """
  (B, T, D), k, E = x.shape, experts.shape[-1], matrices[1].shape[0]
  room = min(T, math.ceil(factor * T * k / E))
  chosen = experts.reshape(B, T * k)
  asks = jnp.repeat(real, k, axis=1)
  turn = jnp.cumsum(jax.nn.one_hot(chosen, E, dtype=jnp.int32) * asks[..., None], axis=1) - 1
  turn = jnp.take_along_axis(turn, chosen[..., None], axis=-1)[..., 0]
  kept = asks & (turn < room)
  slot = jnp.where(kept, chosen * room + turn, E * room)  # the last: nowhere

  def dispatch(tokens, slots):
    return jnp.zeros((E * room, D), x.dtype).at[slots].set(jnp.repeat(tokens, k, axis=0), mode="drop")

  buffers = jax.vmap(dispatch)(x, slot).reshape(B, E, room, D)
  buffers = constrain(buffers, "expert_batch", "expert", None, None)

  def product(a, w, bias=None, *, embed):  # each expert's rows by its matrix
    w = dense(w)
    w = w.astype(jnp.promote_types(w.dtype, a.dtype))  # the product rounds a wider one, and its gradient is as wide
    if a.dtype == w.dtype:
      return jnp.einsum("BECI,EIO->BECO", a, w)
    return jax.vmap(matmul, in_axes=(1, 0), out_axes=1)(a, w)

  y = feed(product, buffers, matrices)
  y = constrain(y, "expert_batch", "expert", None, None).reshape(B, E * room, D)
  y = constrain(y, "batch", None, None)
  y = jnp.take_along_axis(y, jnp.minimum(slot, E * room - 1)[..., None], axis=1)
  y = jnp.where(kept[..., None], weights.reshape(B, T * k, 1).astype(x.dtype) * y, 0)
  dropped = (asks & ~kept).sum() / jnp.maximum(asks.sum(), 1)
  return y.reshape(B, T, k, D).sum(2), dropped
