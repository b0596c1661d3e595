"""Texts to vectors: hidden states of every token, or one embedding a text."""

import functools
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32

from jaxllm.inference.prompts import check_prompt, pad_rows
from jaxllm.models.build import Params
from jaxllm.models.config import ModelConfig
from jaxllm.models.transformer import mean_pool

BATCH = 32  # texts that are computed at once, of similar lengths


def hidden_states(
  graph: nnx.GraphDef, params: Params, config: ModelConfig, texts: Sequence[Sequence[int]]
) -> list[Float[np.ndarray, "T D"]]:
  """The last layer's states of each text's tokens; of an encoder_decoder those of its encoder.

  Raises:
    ConfigError: an empty text, one that is too long, or a token that the model does not have.
  """
  found: dict[int, np.ndarray] = {}
  for members, states in _batches(_programs(graph)[0], params, config, texts):
    found |= {i: row[: len(texts[i])] for i, row in zip(members, states)}
  return [found[i] for i in range(len(texts))]


def embeddings(
  graph: nnx.GraphDef,
  params: Params,
  config: ModelConfig,
  texts: Sequence[Sequence[int]],
  *,
  pooling: Literal["mean", "first"] = "mean",
  normalize: bool = True,
) -> Float32[np.ndarray, "B D"]:
  """A vector for each text: the mean of its states, or the first one, scaled to length 1 if `normalize`.

  Sentence-BERT (arXiv 1908.10084); errors as in `hidden_states`.
  """
  out = np.zeros((len(texts), config.embed_dim), np.float32)
  for members, vectors in _batches(_programs(graph)[1][pooling], params, config, texts):
    out[members] = vectors[: len(members)]
  return out / np.maximum(np.linalg.norm(out, axis=-1, keepdims=True), 1e-12) if normalize else out


@functools.lru_cache(maxsize=8)
def _programs(graph):
  def states(params, tokens, mask):
    model = nnx.merge(graph, params)
    if model.config.architecture == "encoder_decoder":
      return model.encode(tokens, segment_ids=mask)
    return model.hidden(tokens, segment_ids=mask)[0]

  pool = {"mean": mean_pool, "first": lambda x, mask: x[:, 0]}
  pooled = lambda of: lambda params, tokens, mask: of(states(params, tokens, mask), mask)  # noqa: E731
  return jax.jit(states), {name: jax.jit(pooled(of)) for name, of in pool.items()}


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
