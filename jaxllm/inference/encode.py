"""Texts to vectors: hidden states of every token, or one embedding a text."""

import functools
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32

from jaxllm.base.errors import ConfigError
from jaxllm.inference.prompts import check_prompt, pad_rows
from jaxllm.models.build import Params
from jaxllm.models.config import ModelConfig

BATCH = 32  # texts that are computed at once, of similar lengths
Pooling = Literal["mean", "first", "last", "max", "mean_sqrt", "weighted_mean"]


def hidden_states(
  graph: nnx.GraphDef, params: Params, config: ModelConfig, texts: Sequence[Sequence[int]]
) -> list[Float[np.ndarray, "T D"]]:
  """The last layer's states of each text's tokens; of an encoder_decoder those of its encoder.

  Raises:
    ConfigError: an empty text, one that is too long, or a token that the model does not have.
  """
  found: dict[int, np.ndarray] = {}
  for members, states in _batches(_states(graph), params, config, texts):
    found |= {i: row[: len(texts[i])] for i, row in zip(members, states)}
  return [found[i] for i in range(len(texts))]


def embeddings(
  graph: nnx.GraphDef,
  params: Params,
  config: ModelConfig,
  texts: Sequence[Sequence[int]],
  *,
  pooling: Sequence[Pooling] = ("mean",),
  skip: int = 0,
) -> Float32[np.ndarray, "B D"]:
  """A vector for each text: the mean of its states, say, or several such vectors side by side.

  Args:
    pooling: "mean_sqrt": the sum over the square root of their number; "weighted_mean": the n-th counts n times.
    skip: how many first states do not count.

  Raises:
    ConfigError: as in `hidden_states`, or an unknown pooling.
  """
  if unknown := [mode for mode in pooling if mode not in get_args(Pooling)]:
    raise ConfigError(f"pooling is {unknown[0]!r}; choose one of {', '.join(get_args(Pooling))}")
  out = np.zeros((len(texts), config.embed_dim * len(pooling)), np.float32)
  program = functools.partial(_pooled(graph, tuple(pooling)), skip)
  for members, vectors in _batches(program, params, config, texts):
    out[members] = vectors[: len(members)]
  return out


@functools.lru_cache(maxsize=8)
def _states(graph):
  @jax.jit
  def states(params, tokens, mask):
    model = nnx.merge(graph, params)
    if model.config.architecture == "encoder_decoder":
      return model.encode(tokens, segment_ids=mask)
    return model.hidden(tokens, segment_ids=mask)[0]

  return states


@functools.lru_cache(maxsize=8)
def _pooled(graph, pooling):
  @jax.jit
  def pooled(skip, params, tokens, mask):
    counted = (mask != 0) & (jnp.arange(mask.shape[1]) >= skip)
    states = _states(graph)(params, tokens, mask).astype(jnp.float32)
    return jnp.concatenate([_pool(mode, states, counted) for mode in pooling], axis=-1)

  return pooled


def _pool(mode: Pooling, x: Float32[Array, "B T D"], counted: Bool[Array, "B T"]) -> Float32[Array, "B D"]:
  if mode in ("first", "last"):
    at = jnp.argmax(counted, axis=1)
    if mode == "last":
      at = counted.shape[1] - 1 - jnp.argmax(counted[:, ::-1], axis=1)
    return jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
  if mode == "max":
    return jnp.where(counted[..., None], x, -jnp.inf).max(axis=1)
  weights = counted * (jnp.arange(1, counted.shape[1] + 1) if mode == "weighted_mean" else 1.0)
  count = jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
  total = jnp.where(counted[..., None], x * weights[..., None], 0).sum(axis=1)
  return total / (jnp.sqrt(count) if mode == "mean_sqrt" else count)


def _batches(program, params, config, texts) -> Iterator[tuple[list[int], np.ndarray]]:
  """(which texts, the program's float32 rows for them and for some padding)."""
  for number, text in enumerate(texts):
    check_prompt(text, f"text {number + 1}" if len(texts) > 1 else "the text", config)
  by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
  for first in range(0, len(texts), BATCH):
    members = by_length[first : first + BATCH]
    empty = (1 << (len(members) - 1).bit_length()) - len(members)  # powers of two share compilations
    tokens, lengths = pad_rows([*(texts[i] for i in members), *[()] * empty], config)
    mask = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
    yield members, np.asarray(program(params, tokens, mask).astype(jnp.float32))
