"""Kernels on a mesh: every device computes its own part of a call.

The compiler cannot split a kernel that it did not write, and would gather its operands on every device instead. So on
accelerators every kernel runs by shards, through this file: logical axes say how arrays lie (`Shards.spec`), and what
is gathered before and added up after stands here. Outside `activation_sharding` the functions are the plain ones.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm import kernels
from jaxllm.base.errors import ConfigError
from jaxllm.kernels import KVPages, QuantizedWeight, flash_attention
from jaxllm.kernels.backends import TARGETS
from jaxllm.kernels.quantized import part_axes
from jaxllm.kernels.quantized.api import of_gradient
from jaxllm.parallel.config import AxisRules
from jaxllm.parallel.sharding import activation_context, partition_spec

# ---------------------------------------------------------------- shards


@dataclasses.dataclass(frozen=True)
class Shards:
  """How arrays lie on a mesh, and running a function on every device's shards of them."""

  mesh: Mesh
  rules: AxisRules

  def ways(self, axes) -> int:
    """How many ways these mesh axes, or those of an entry of a PartitionSpec, split an array."""
    return math.prod(self.mesh.shape[axis] for axis in names(axes))

  def spec(self, shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """Of an array with these logical axes: without mesh axes of one device, and whole where they do not divide it."""
    entries = []
    for entry, size in zip(partition_spec(axes, self.rules, "the operand of a kernel"), shape, strict=True):
      split = tuple(axis for axis in names(entry) if self.mesh.shape[axis] > 1)
      entries.append(split if split and size % self.ways(split) == 0 else None)
    return PartitionSpec(*entries)

  def run(self, function: Callable, out_specs: Any, *arguments: tuple[Any, Any]) -> Any:
    """`function` of the shards, on every device; an argument comes with its spec."""
    arrays, specs = zip(*arguments)
    # Kernels do not say what varies, so nothing can check it.
    return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(*arrays)


def shards() -> Shards | None:
  """Of the surrounding `activation_sharding`; None outside it and on one device."""
  context = activation_context()
  return None if context is None else Shards(*context)


def names(entry) -> tuple[str, ...]:
  """The mesh axes in one entry of a PartitionSpec."""
  return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def gathered(x: Array, spec: PartitionSpec) -> Array:
  """The whole of an array of which this device has a shard."""
  for dimension, entry in enumerate(spec):
    if axes := names(entry):
      x = lax.all_gather(x, axes, axis=dimension, tiled=True)
  return x


# ---------------------------------------------------------------- attention

_ATTENTION_AXES = {  # of the array arguments
  "query_offset": ("batch",),
  "key_positions": ("batch", None),
  "prefix_lengths": ("batch",),
  "sinks": ("heads",),
  "alibi_slopes": ("heads",),
  "bias": ("batch", "heads", "seq", None),
}


def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  *,
  target: str,
  **options: Any,
) -> Float[Array, "B T N H"]:
  """`flash_attention`; queries are split over the mesh's `context` axis, and every device of it holds all keys and
  values of its rows.

  Raises:
    ConfigError: key heads that are whole on every device do not go with the parts of the query heads.
  """
  on = shards()
  if on is None or TARGETS.get(target) == "cpu":  # there the compiler splits the plain form
    return flash_attention(query, key, value, target=target, **options)  # type: ignore[return-value]
  queries = on.spec(query.shape, "batch", "seq", "heads", None)
  keys = on.spec(key.shape, "batch", None, "kv_heads", None)
  rows, positions, heads, _ = queries
  arrays = {name: options.pop(name) for name in _ATTENTION_AXES if options.get(name) is not None}
  specs: dict[str, Any] = {name: on.spec(x.shape, *_ATTENTION_AXES[name]) for name, x in arrays.items()}
  if positions:
    arrays.setdefault("query_offset", jnp.zeros(query.shape[0], jnp.int32))
    specs["query_offset"] = PartitionSpec(rows)
  if (segments := options.pop("segment_ids", None)) is not None:
    arrays["segment_ids"], specs["segment_ids"] = segments, (PartitionSpec(rows, positions), PartitionSpec(rows, None))
  N, K, ways = query.shape[2], key.shape[2], on.ways(heads)
  few = ways > 1 and not keys[2]  # each device takes the key heads of its query heads
  if few and ways % K and K % ways:
    raise ConfigError(f"{K} key heads, kept whole, do not go with query heads in {ways} parts")

  def local(query, key, value, arrays):
    if few:
      first = lax.axis_index(heads) * query.shape[2] // (N // K)
      key, value = (lax.dynamic_slice_in_dim(x, first, max(1, K // ways), axis=2) for x in (key, value))
    if positions:
      start = lax.axis_index(positions) * query.shape[1]
      arrays = arrays | {"query_offset": arrays["query_offset"] + start}
    return flash_attention(query, key, value, target=target, **arrays, **options)

  return on.run(local, queries, (query, queries), (key, keys), (value, keys), (arrays, specs))


def paged_attention(
  query: Float[Array, "T N H"],
  pages: KVPages,
  page_table: Int[Array, "B max_pages"],
  kv_lengths: Int[Array, " B"],
  query_starts: Int[Array, " B+1"] | None = None,
  num_sequences: Int[Array, ""] | int | None = None,
  *,
  sinks: Float[Array, " N"] | None = None,
  alibi_slopes: Float[Array, " N"] | None = None,
  **options: Any,
) -> Any:
  """`kernels.paged_attention`; query heads and the heads of the pages are split, tokens and pages are whole everywhere.

  Where the key heads do not divide, every device computes all heads.
  """
  given = {"sinks": sinks, "alibi_slopes": alibi_slopes}
  of_heads = {name: x for name, x in given.items() if x is not None}
  tables = (page_table, kv_lengths, query_starts, num_sequences)
  on = shards()
  heads = None if on is None else on.spec((pages.num_kv_heads,), "kv_heads")[0]
  ways = 1 if on is None else on.ways(heads)
  # Rows of pages laid out for a TPU hold several heads, which stay together.
  if on is None or heads is None or query.shape[1] % ways or pages.num_kv_heads % (ways * pages.together):
    return kernels.paged_attention(query, pages, *tables, **of_heads, **options)

  def local(query, pages, tables, of_heads):
    if pages.heads:
      pages = dataclasses.replace(pages, heads=(pages.heads[0] // ways, pages.heads[1]))
    return kernels.paged_attention(query, pages, *tables, **of_heads, **options)

  by_head = PartitionSpec(None, heads)
  arguments = (query, by_head), (pages, by_head), (tables, PartitionSpec()), (of_heads, PartitionSpec(heads))
  return on.run(local, (by_head, by_head) if options.get("return_lse") else by_head, *arguments)


# ---------------------------------------------------------------- quantized weights


def quantized_specs(on: Shards, weight: QuantizedWeight, axes: tuple[str | None, ...]) -> QuantizedWeight:
  """A PartitionSpec in the place of each part of a weight [..., D, F] with these logical axes.

  A dimension that its mesh axes cannot split, by `kernels.quantized.weights.splits`, is whole.
  """
  ways = lambda axis: on.ways(getattr(on.rules, axis))  # noqa: E731
  found = part_axes(weight, axes, ways)
  return dataclasses.replace(
    weight, **{name: on.spec(getattr(weight, name).shape, *of_part) for name, of_part in found.items()}
  )


def quantized_matmul(
  x: Float[Array, "*batch D"],
  weight: QuantizedWeight,
  axes: tuple[str | None, str | None],
  *,
  transposed: bool = False,
  backend: str | None = None,
  target: str | None = None,
) -> Float[Array, "*batch F"]:
  """`kernels.quantized_matmul`, x W or x W^T, differentiable in x.

  Where a weight's mesh axes split the tokens too (FSDP) its codes and scales are gathered, as they are: a dense weight
  never travels. Where they do not (tensor parallelism) the weight stays: of split outputs each device computes its own,
  of split inputs the devices' sums are added up once, in float32. So is the gradient. (Hopper's kernel for x W^T rounds
  each device's sum to bfloat16 before.) Codes lie with a mesh axis as `quantized_specs` says.

  Args:
    x: [B, T, D], [B, D] or any; its first two axes are "batch" and "seq".
    axes: the logical axes of W [D, F].
  """
  on = shards()
  if on is None:
    return kernels.quantized_matmul(x, weight, transposed=transposed, backend=backend, target=target)
  batch = on.spec(x.shape[:-1], *(("batch", "seq")[: x.ndim - 1] + (None,) * (x.ndim - 3)))
  return _quantized(_Product(on, axes, batch, transposed, backend, target), x, weight)


@dataclasses.dataclass(frozen=True)
class _Product:
  """What is fixed of a product with a quantized weight when it is traced."""

  on: Shards
  axes: tuple[str | None, str | None]
  batch: PartitionSpec  # of x without its last axis
  transposed: bool
  backend: str | None
  target: str | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantized(call, x, weight):
  on, specs = call.on, quantized_specs(call.on, weight, call.axes)
  tokens = {*on.rules.batch, *on.rules.seq}
  of_features, of_inputs = specs.values
  # Activations that are rounded have a scale of all their inputs.
  stays = lambda entry: bool(entry) and not tokens & set(names(entry))  # noqa: E731
  inputs = of_inputs if stays(of_inputs) and not (weight.dynamic and not call.transposed) else None
  features = of_features if stays(of_features) else None

  def part(array, spec):  # gathered where it does not stay
    return gathered(array, PartitionSpec(*(None if e in (inputs, features) else e for e in spec)))

  def local(x, weight):
    parts = {name: part(getattr(weight, name), getattr(specs, name)) for name in ("values", "scales")}
    zeros = None if weight.zeros is None else part(weight.zeros, specs.zeros)
    whole = dataclasses.replace(weight, **parts, zeros=zeros, in_features=weight.in_features // on.ways(inputs))
    product = functools.partial(
      kernels.quantized_matmul, transposed=call.transposed, backend=call.backend, target=call.target
    )
    if contracted is None:
      return product(x, whole)
    return lax.psum(product(x, whole, dtype=jnp.float32), contracted).astype(x.dtype)

  contracted, outputs = (features, inputs) if call.transposed else (inputs, features)
  last = lambda entry: PartitionSpec(*call.batch, entry)  # noqa: E731
  return on.run(local, last(outputs), (x, last(contracted)), (weight, specs))


def _quantized_backward(call, weight, dy):
  backend, weight = of_gradient(call.backend, weight, call.transposed)
  call = dataclasses.replace(call, transposed=not call.transposed, backend=backend)
  return _quantized(call, dy, weight), None


_quantized.defvjp(lambda call, x, weight: (_quantized(call, x, weight), weight), _quantized_backward)


# ---------------------------------------------------------------- experts


def by_experts(
  compute: Callable[..., Array],
  x: Float[Array, "B T D"],
  weights: Float[Array, "B T k"],
  experts: Int[Array, "B T k"],
  matrices: tuple[Any, ...],
  axes: tuple[Any, ...],
) -> Float[Array, "B T D"]:
  """What `compute` makes of tokens, the experts that each goes to and the experts' matrices.

  On a mesh with an `expert` axis a device holds some of the experts. It gathers the tokens of the devices along that
  axis, adds up what its experts say of them, and hands back the sums. Matrices arrive as they are stored; the product
  gathers them, rounded.

  Args:
    compute: (x, weights, experts, matrices, first expert that these matrices are of, the mesh axes over which their
      `embed` dimension is split) -> the sum for each token.
    matrices: [E, ...] each, or trees of such arrays, or None.
    axes: the logical axes of each array.
  """
  on = shards()
  if on is None:
    return compute(x, weights, experts, matrices, 0, ())
  rules, spec = on.rules, functools.partial(partition_spec, rules=on.rules)
  token = spec(("batch", "seq", None))
  specs = jax.tree.map(lambda _, of_array: spec(of_array), matrices, axes)
  exchanged = tuple(axis for axis in rules.expert if axis in rules.batch)
  summed = tuple(axis for axis in (*rules.expert, *rules.mlp) if axis not in exchanged)
  # Where the matrices' `embed` is split and the tokens are not, as in the engine, all devices compute the same.
  same = tuple(axis for axis in rules.embed if axis not in rules.batch)

  def local(x, weights, experts, matrices):
    held = next(matrix.shape[0] for matrix in matrices if matrix is not None)
    first = lax.axis_index(rules.expert) * held if rules.expert else 0
    if exchanged:
      x, weights, experts = (lax.all_gather(a, exchanged, tiled=True) for a in (x, weights, experts))
    y = compute(x, weights, experts, matrices, first, rules.embed)
    if same:
      y = jnp.where(lax.axis_index(same) == 0, y, 0)
    if summed or same:
      y = lax.psum(y, (*summed, *same))
    return lax.psum_scatter(y, exchanged, tiled=True) if exchanged else y

  # Grouped products do say what varies, from which their gradients' sums follow.
  run = jax.shard_map(local, mesh=on.mesh, in_specs=(token, token, token, specs), out_specs=token)
  return run(x, weights, experts, matrices)
