"""All layers of a Llama for a few tokens in one C++ call (`kernels/cpu/layers.cc`): decoding on CPUs."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.kernels import cpu_ffi
from jaxllm.kernels.paged.pages import KVPages
from jaxllm.kernels.quantized.weights import NF4, QuantizedWeight

TOKENS = 16  # at most, as many as a tile has rows
KINDS = {"int8": 2, "int4": 3, "int4 with zero points": 4, "nf4": 5}  # 0: float32, 1: bfloat16
TABLES = (np.arange(16) - 8, np.arange(16), NF4)  # the numbers of packed codes


@dataclasses.dataclass(frozen=True)
class Layer:
  """A layer's arrays. Matrices [I, O]: query, key, value, output, gate, up, down."""

  attention_norm: Float[Array, " D"]
  mlp_norm: Float[Array, " D"]
  matrices: tuple[Array | QuantizedWeight, ...]
  pages: KVPages


def refuses(tokens: int, layers: Sequence[Layer], dtype: jnp.dtype) -> str | None:
  """Why the kernel cannot compute these layers in this dtype, or None."""
  if not 0 < tokens <= TOKENS:
    return f"up to {TOKENS} tokens, not {tokens}"
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"float32 and bfloat16, not {dtype}"
  if not cpu_ffi.available():
    return cpu_ffi.why_unavailable() or "the C++ kernels are switched off or did not build"
  for layer in layers:
    pages, kinds = layer.pages, [_kind(w) for w in layer.matrices]
    if pages.keys.dtype not in (jnp.float32, jnp.bfloat16) or pages.heads or pages.head_dim % 16:
      return "pages of float32 or bfloat16, of heads of a multiple of 16"
    # what is read together is laid out once
    if None in kinds or len(set(kinds[:3])) > 1 or kinds[4] != kinds[5]:
      return "dense, int8, int4 and nf4 weights, queries as keys and values and gate as up"
    if dtype == jnp.float32 and kinds[0] is not None and any(k[0] == 1 for k in kinds if k):
      return "weights of the dtype in which they are multiplied"
  return None


def run(
  x: Float[Array, "N D"],
  rope: tuple[Float[Array, "N H/2"], Float[Array, "N H/2"]],
  table: Int[Array, "B max_pages"],
  sequence: Int[Array, " N"],
  position: Int[Array, " N"],
  layers: Sequence[Layer],
  *,
  heads: int,
  eps: float,
  scale: float,
  dtype: jnp.dtype,
) -> tuple[Float[Array, "N D"], list[KVPages]]:
  """x after all layers, in float32, and the pages with these tokens. A residual stream in float32.

  Args:
    sequence, position: of each token its row of `table` and its place there; -1: it is padding, and writes nothing.
    heads: of queries. scale: of scores. dtype: to what the inputs of products are rounded.
  """
  arguments: list[Array] = []
  kinds: list[tuple[int, int, int]] = []
  aliases = {}
  fixed = 7
  results: list[jax.ShapeDtypeStruct] = [jax.ShapeDtypeStruct(x.shape, jnp.float32)]
  for layer in layers:
    arguments += [layer.attention_norm.astype(jnp.float32), layer.mlp_norm.astype(jnp.float32)]
    for w in layer.matrices:
      kind = _kind(w)
      assert kind is not None
      kinds.append(kind)
      arguments += parts(w)
    for pages in (layer.pages.keys, layer.pages.values):
      aliases[fixed + len(arguments)] = len(results)
      arguments.append(pages)
      results.append(jax.ShapeDtypeStruct(pages.shape, pages.dtype))
  whole = lambda x: x.astype(jnp.int32)  # noqa: E731
  y, *pages = cpu_ffi.call(
    "cpu_layers",
    results,
    x.astype(jnp.float32),
    *rope,
    *map(whole, (table, sequence, position)),
    jnp.asarray(np.stack(TABLES), jnp.float32),
    *arguments,
    aliases=aliases,
    kinds=np.asarray(kinds, np.int64).reshape(-1),
    heads=np.int64(heads),
    inner=np.int64(layers[0].matrices[4].shape[1]),
    round=dtype == jnp.bfloat16,
    eps=np.float32(eps),
    scale=np.float32(scale),
  )
  new = [dataclasses.replace(layer.pages, keys=pages[2 * i], values=pages[2 * i + 1]) for i, layer in enumerate(layers)]
  return y, new


def few_refuses(x: Float[Array, "M D"], w: QuantizedWeight) -> bool:
  """Whether `few` cannot compute x W."""
  return not 0 < x.shape[0] <= TOKENS or x.dtype != jnp.bfloat16 or _kind(w) is None


def few(x: Float[Array, "M D"], w: QuantizedWeight) -> Float[Array, "M F"]:
  """x W of a few bfloat16 tokens, in float32: on the tile unit from three on."""
  kind = _kind(w)
  assert kind is not None
  return cpu_ffi.call(
    "cpu_few",
    jax.ShapeDtypeStruct((x.shape[0], w.shape[-1]), jnp.float32),
    x.astype(jnp.float32),
    *parts(w),
    jnp.asarray(np.stack(TABLES), jnp.float32),
    kind=np.int64(kind[0]),
    group=np.int64(kind[2]),
    round=True,
  )


def parts(w: Array | QuantizedWeight) -> tuple[Array, Array, Array]:
  """A matrix, its scales and its zero points as the C++ kernels take them: empty where there are none."""
  none = jnp.zeros(0, jnp.float32)
  if not isinstance(w, QuantizedWeight):
    return w, none, none
  return w.values, w.scales.astype(jnp.float32), none if w.zeros is None else w.zeros.astype(jnp.float32)


def _kind(w: Array | QuantizedWeight) -> tuple[int, int, int] | None:
  """A matrix for the kernel: its kind, inputs and inputs that share a scale; None for others."""
  if not isinstance(w, QuantizedWeight):
    kind = {jnp.dtype(jnp.float32): 0, jnp.dtype(jnp.bfloat16): 1}.get(jnp.dtype(w.dtype))
    return None if kind is None or w.ndim != 2 else (kind, w.shape[0], 0)
  size = w.group_size or w.padded_features
  if w.values.ndim != 2 or w.format not in KINDS or size < w.padded_features and (size < 32 or size & (size - 1)):
    return None
  return KINDS[w.format if w.zeros is None else "int4 with zero points"], w.in_features, size
