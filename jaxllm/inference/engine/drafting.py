"""A draft model on the device: it reads what the large model reads, into pages of its own that lie as the large one's,
and guesses a few tokens ahead."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine.sizes import Shape, Sizes, packs
from jaxllm.inference.engine.steps import Batch, Reading, State, draw
from jaxllm.inference.prompts import longest_text
from jaxllm.models.build import Params
from jaxllm.models.caches import KVCache, init_paged_cache
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.stores import Paged, Store
from jaxllm.models.transformer import Transformer


def check_draft(draft: ModelConfig, target: ModelConfig, longest: int) -> None:
  """That the one can guess for the other.

  Raises:
    ConfigError: it cannot, and why.
  """
  if draft.architecture != "decoder" or draft.head != "lm" or target.architecture != "decoder":
    raise ConfigError("speculative.model: both models must be decoders that write text")
  if packs(target) and not packs(draft):
    raise ConfigError("speculative.model: relative positions and sink tokens do not fit beside this model")
  if longest_text(draft) < longest:
    raise ConfigError(f"speculative.model reads {draft.max_seq_len} tokens; max_model_len is {longest}")
  if "global" not in _tables(target) and ("global" in _tables(draft) or _window(draft) > _window(target)):
    raise ConfigError("speculative.model sees further back than this model, which keeps only its window's tokens")


def draft_layers(draft: ModelConfig, target: ModelConfig, sizes: Sizes, compute: Compute) -> tuple[Store, ...]:
  """Empty pages of a draft model, named by the large one's tables: of layers that keep all, where it has any."""
  count = {kind: pages + 1 for kind, pages in sizes.pages.items()}
  name = "global" if "global" in _tables(target) else "local"
  pages = dict.fromkeys(("global", "local"), count[name])
  how = dict(pages=pages, page_size=sizes.page_size, dtype=sizes.kv_dtype, target=compute.target)
  cache = init_paged_cache(draft, 1, sizes.max_model_len, **how)
  stores = [layer for layer in cache.layers if isinstance(layer, Paged)]
  return tuple(dataclasses.replace(layer, table=name) for layer in stores)


def draft_function(graph: nnx.GraphDef, sizes: Sizes, shape: Shape, vocab_size: int) -> Callable:
  """draft(params, state, batch) -> state: reads the tokens of a step and guesses each row's drafts, which it leaves in
  `state.tokens`.

  A guess is drawn as the large model would draw there, with the same noise: so the two agree wherever their
  distributions nearly do.
  """

  def draft(params: Params, state: State, batch: Batch):
    model: Transformer = nnx.merge(graph, params)
    slots, lengths, counts, _, drafted, known = batch.rows
    nowhere = state.tokens.shape[1]

    def read(layers, tokens, lengths, counts, shape):
      reading = Reading.of(counts, shape, sizes.packed)
      cache = KVCache(layers, lengths, counts, batch.tables, known=known)
      positions = cache.positions(reading.row_of.shape)
      inputs = tokens.at[slots[reading.row_of], positions].get(mode="clip")
      return model.hidden(jnp.clip(inputs, 0, model.config.vocab_size - 1), cache=cache)

    if not shape.drafts:
      _, after = read(state.draft_layers, state.tokens, lengths, counts, shape)
      return dataclasses.replace(state, draft_layers=after.layers)

    def guess(carry, i):
      layers, tokens = carry
      goes_on = jnp.where(i == 0, counts - drafted, i <= drafted)
      x, after = read(layers, tokens, lengths + i, goes_on.astype(counts.dtype), Shape(shape.rows, 1))
      place = lengths + i + 1
      logits = _resized(model.logits(x)[:, 0], vocab_size)
      token = draw(logits, state.sampling, tokens, slots, place[:, None], None)[:, 0]
      where = jnp.where(i < drafted, place, nowhere)
      return (after.layers, tokens.at[slots, where].set(jnp.maximum(token, 0), mode="drop")), None

    start = state.draft_layers, state.tokens
    (layers, tokens), _ = jax.lax.scan(guess, start, jnp.arange(shape.drafts + 1))
    return dataclasses.replace(state, draft_layers=layers, tokens=tokens)

  return draft


def _resized(logits, vocab_size: int):
  """As many logits as the large model has; models of one tokenizer pad their vocabularies differently."""
  missing = max(0, vocab_size - logits.shape[1])
  return jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)[:, :vocab_size]


def _tables(config: ModelConfig) -> set[str]:
  return {"local" if kind == "local" else "global" for kind in config.layer_kinds}


def _window(config: ModelConfig) -> int:
  return config.sliding_window or 0
