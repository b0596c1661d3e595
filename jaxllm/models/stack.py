"""The stack of layers: one block, declared once for every layer, run in a scan or one after the other."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.kernels import backends
from jaxllm.models import few_tokens
from jaxllm.models.adapters import Bottleneck
from jaxllm.models.attention import Attention, CrossAttention, Placement
from jaxllm.models.caches import Cache
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.convolution import Convolution
from jaxllm.models.mla import LatentAttention
from jaxllm.models.mlp import MLP
from jaxllm.models.moe import MoE, RouterLosses
from jaxllm.models.norms import Norm
from jaxllm.models.remat import remat
from jaxllm.models.weights import is_per_layer
from jaxllm.parallel.sharding import constrain

# XLA:CPU is faster on straight code than in a loop; beyond this depth its compile time is not worth it.
CPU_UNROLL = 8
# Before jax 0.11 it has no updates of slices in 16 bits: at every layer of a loop it would widen all that the layers
# before have kept for the backward pass, and round it again, which takes several times as long as the layer itself.
CPU_UNROLL_16_BITS = 64 if jax.__version_info__ < (0, 11) else CPU_UNROLL
FEED_FORWARD = {"mlp": MLP, "moe": MoE}


class Block(nnx.Module):
  """Attention, cross-attention and feed-forward on a residual stream, with norms where the config places them.

  `feed_forward` names the last: a plain "mlp", or experts, "moe". None: a stack of layers that have either.
  """

  def __init__(self, c: ModelConfig, compute: Compute, feed_forward: str | None, *, rngs):
    self.placement, self.parallel, self.feed_forward = c.norm_placement, c.parallel_residual, feed_forward
    self.shared_norm, self.scale = c.shared_norm, c.residual_scale
    norm = functools.partial(Norm, c, compute, rngs=rngs)
    self.attention = (LatentAttention if c.mla else Attention)(c, compute, rngs=rngs)
    if feed_forward is not None:
      setattr(self, feed_forward, FEED_FORWARD[feed_forward](c, compute, rngs=rngs))
    self.cross_attention = CrossAttention(c, compute, rngs=rngs) if c.architecture == "encoder_decoder" else None
    if c.adapter is not None and c.adapter.bottleneck_dim:
      self.attention_adapter, self.mlp_adapter = (Bottleneck(c, compute, rngs=rngs) for _ in range(2))
    self.adapted = c.adapter is not None and c.adapter.bottleneck_dim > 0
    parts = ("attention", "mlp") if self.cross_attention is None else ("attention", "cross_attention", "mlp")
    for part in parts:
      if c.norm_placement in ("pre", "sandwich") and not (part == "mlp" and c.shared_norm):
        setattr(self, f"{part}_norm", norm())
      if c.norm_placement != "pre":
        setattr(self, f"{part}_post_norm", norm())

  def __call__(
    self, x: Float[Array, "B T D"], place: Placement, kind: str, layer: int, cache: Cache, first: bool = False
  ) -> tuple[Float[Array, "B T D"], Cache, RouterLosses | None]:
    """`first`: the first layer of a model that has no norm before it."""

    def normed(x, part):
      return getattr(self, f"{part}_norm")(x) if self.placement in ("pre", "sandwich") else x

    def scaled(h):
      return h if self.scale is None else h * jnp.asarray(self.scale, h.dtype)

    def add(x, h, part):
      if self.placement == "pre":
        return x + scaled(h)
      norm = getattr(self, f"{part}_post_norm")
      return norm(x + scaled(h)) if self.placement == "post" else x + scaled(norm(h))

    def feed(x):
      if self.feed_forward == "mlp":
        return self.mlp(x), None
      return self.moe(x, cache.segment_ids, drop=not cache.keeps)

    def adapt(h, part):
      return getattr(self, f"{part}_adapter")(h) if self.adapted else h

    y = x if first else normed(x, "attention")
    h, cache = self.attention(y, place, kind, layer, cache)
    h = adapt(h, "attention")
    if self.parallel:
      y, losses = feed(y if self.shared_norm else normed(x, "mlp"))
      y = adapt(y, "mlp")
      return constrain(x + scaled(h) + scaled(y), "batch", "seq", None), cache, losses
    x = add(x, h, "attention")
    if self.cross_attention is not None:
      h, cache = self.cross_attention(normed(x, "cross_attention"), layer, cache)
      x = add(x, h, "cross_attention")
    h, losses = feed(normed(x, "mlp"))
    return constrain(add(x, adapt(h, "mlp"), "mlp"), "batch", "seq", None), cache, losses


def stack_blocks(c: ModelConfig, compute: Compute, rngs: nnx.Rngs) -> Block:
  """All layers' Blocks as one, every parameter with a leading axis of the layers that have it."""
  counts = {name: len(c.layers_with(name)) for name in FEED_FORWARD}
  only = next((name for name, count in counts.items() if count == c.num_layers), None)
  blocks = _stack(lambda r: Block(c, compute, only, rngs=r), c.num_layers, rngs)
  if only is None:
    blocks.mlp = _stack(lambda r: MLP(c, compute, rngs=r), counts["mlp"], rngs)
    blocks.moe = _stack(lambda r: MoE(c, compute, rngs=r), counts["moe"], rngs)
  return blocks


def run_blocks(
  blocks: Block,
  c: ModelConfig,
  compute: Compute,
  x: Float[Array, "B T D"],
  place: Placement,
  cache: Cache,
  convolution: Convolution | None = None,
) -> tuple[Float[Array, "B T D"], Cache, RouterLosses | None]:
  """x after all layers, the cache with these tokens, and the mean of the routers' losses (None without experts).

  Scanned in training, straight code for a cache that keeps tokens or for layers that are not stacked.
  """
  graph, state = nnx.split(blocks)
  weights = nnx.to_pure_dict(state)

  def layer(i, x, weights, cache):
    own = graph if blocks.feed_forward else _block_graph(c, compute, i in c.moe_layers)
    first = i == 0 and not c.first_norm
    y, cache, losses = nnx.merge(own, weights)(x, place, c.layer_kinds[i % len(c.layer_kinds)], i, cache, first)
    if i == 0 and convolution is not None:
      y = convolution(x, y, cache.segment_ids)
    return y, cache, losses

  if (found := few_tokens.run(c, compute, x, place, cache, lambda i: _one_layer(c, weights, 0, i))) is not None:
    return *found, None
  if cache.keeps or any(map(is_per_layer, jax.tree.leaves(weights, is_leaf=is_per_layer))):
    x, cache, losses = _straight(c, layer, weights, x, cache)
  else:
    x, losses = _scanned(c, compute, layer, weights, x, cache)
  return x, cache, jax.tree.map(lambda total: total / len(c.moe_layers), losses)


def _straight(c: ModelConfig, layer: Callable, weights, x, cache):
  """One layer after the other: in a loop XLA would copy each layer's weights and cache for every token."""
  losses = []
  for i in range(c.num_layers):
    x, cache, loss = layer(i, x, _one_layer(c, weights, 0, i), cache)
    losses.append(loss)
  return x, cache, _total(losses)


def _scanned(c: ModelConfig, compute: Compute, layer: Callable, weights, x, cache):
  """Of each run of layers that repeat, one period per scan step; a rest runs after the scan."""
  losses = []

  def group(x, weights, layers, stacked=True):
    # What is taken of a stack before `remat` would be kept for the backward pass: another copy of all weights.
    def run(i, x, weights):
      x, _, loss = layer(i, x, _one_layer(c, weights, layers.start, i) if stacked else weights, cache)
      return x, loss

    losses = []
    for i in layers:
      x, loss = remat(functools.partial(run, i), compute)(x, weights)
      losses.append(loss)
    return x, _total(losses)

  for start, stop, period in c.layer_runs:
    steps = (stop - start) // period
    end = start + steps * period
    if steps:
      grouped = _some_layers(c, weights, start, end)
      if period > 1:
        grouped = jax.tree.map(lambda w, n=steps: w.reshape(n, -1, *w.shape[1:]), grouped)
      step = functools.partial(group, layers=range(start, start + period), stacked=period > 1)
      x, loss = jax.lax.scan(step, x, grouped, unroll=_unroll(c, compute, steps, period))
      losses.append(loss)
    if end < stop:
      x, loss = group(x, _some_layers(c, weights, end, stop), range(end, stop))
      losses.append(loss)
  return x, _total(losses)


def _unroll(c: ModelConfig, compute: Compute, steps: int, period: int) -> int:
  if compute.unroll_layers is not None:
    return max(1, min(steps, compute.unroll_layers // period))
  on_cpu = backends.TARGETS[compute.target] == "cpu"
  most = CPU_UNROLL if compute.dtype == "float32" else CPU_UNROLL_16_BITS
  # Out of a loop, XLA for CPUs takes what `compute.remat` would compute again for what it has still, and keeps it.
  return steps if on_cpu and c.num_layers <= most and compute.remat == "none" else 1


def _stack(build: Callable, count: int, rngs: nnx.Rngs):
  """`count` modules as one, every parameter with a leading axis named "layers"."""
  split = nnx.vmap(build, in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
  return split(rngs.split(count))


def _rows(c: ModelConfig, part: str, start: int, stop: int) -> range:
  """Which rows of the stack of `part`, a child of Block, belong to the layers from start to stop."""
  layers = c.layers_with(part)
  return range(sum(i < start for i in layers), sum(i < stop for i in layers))


def _some_layers(c: ModelConfig, weights: dict, start: int, stop: int) -> dict:
  """The stacks of the layers from start to stop, without those that none of these layers has."""
  rows = {part: _rows(c, part, start, stop) for part in weights}
  cut = lambda w, r: w[r.start : r.stop]  # noqa: E731
  return {part: jax.tree.map(functools.partial(cut, r=r), weights[part]) for part, r in rows.items() if r}


def _one_layer(c: ModelConfig, weights: dict, start: int, layer: int) -> dict:
  """One layer's parameters, of stacks that begin at the layer `start`."""
  own = [part for part in weights if layer in c.layers_with(part)]
  take = lambda w, row: w[row]  # noqa: E731
  row = {part: len(_rows(c, part, start, layer)) for part in own}
  return {
    part: jax.tree.map(functools.partial(take, row=row[part]), weights[part], is_leaf=is_per_layer) for part in own
  }


@functools.lru_cache(maxsize=8)
def _block_graph(c: ModelConfig, compute: Compute, sparse: bool) -> nnx.GraphDef:
  """The static part of one Block, of a model that has layers with experts and layers without."""
  with nnx.use_eager_sharding(False):
    block = nnx.eval_shape(lambda: Block(c, compute, "moe" if sparse else "mlp", rngs=nnx.Rngs(params=0)))
  return nnx.split(block)[0]


def _total(losses: list[RouterLosses | None]) -> RouterLosses | None:
  """The sum over layers; a scan's have a leading axis of its steps."""
  found = [loss for loss in losses if loss is not None]
  return jax.tree.map(lambda *values: sum(jnp.sum(value) for value in values), *found) if found else None
