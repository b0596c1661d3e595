"""What the device computes: a step of many rows, a row's beginning, an encoder's reading. Pure functions.

The device keeps each row's tokens (`State.tokens`), by the row's slot: the host says only which positions a step reads,
and what a step draws is there for the next one before the host has seen it.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxllm.inference.engine.sizes import Shape, Sizes
from jaxllm.inference.sampling import SamplingRows
from jaxllm.models.build import Params
from jaxllm.models.caches import Encoded, KVCache, init_cache
from jaxllm.models.head import log_probs
from jaxllm.models.multi_lora import with_adapters
from jaxllm.models.stores import Store
from jaxllm.models.transformer import Transformer

AT_ONCE = 64  # tokens of a prompt whose logits are in memory at once
DRAWS, SHOWS, SCORES = 1, 2, 4  # what a row wants: a token; its log-probabilities; those of the tokens it reads
NO_TOKEN, NO_NUMBERS = -1, -2  # in place of a token: the settings leave none; the logits are not finite


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What stays on the device from step to step; every program takes it as a donation."""

  layers: tuple[Store, ...]
  draft_layers: tuple[Store, ...]  # of the model that drafts
  tokens: Int[Array, "slots max_model_len"]
  sampling: SamplingRows  # by slot
  encoded: Encoded | None  # of an encoder_decoder, by slot
  adapters: Int[Array, " slots"] | None = None  # under which each row is; None: there are none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """A step as the host sends it: of each row its slot, tokens in the cache, tokens to compute, wishes, how many of the
  tokens to compute are drafts, its last ones, and `Row.known`."""

  rows: Int[Array | np.ndarray, "6 R"]
  tables: dict[str, Int[Array | np.ndarray, "R max_pages"]]
  drafts: Int[Array | np.ndarray, "R K"]  # -1: the device has it already
  allowed: UInt32[Array | np.ndarray, "R K+1 W"]  # what grammars admit at each drawn position, packed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogProbs:
  """In nats, at temperature 1: of a token and the likeliest ones; zeros where nobody wants them."""

  token: Float[Array, "*N"]
  rank: Int[Array, "*N"]  # of the token; 1: the likeliest
  top_ids: Int[Array, "*N top"]
  top: Float[Array, "*N top"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
  """What a step gives back: of each row a token for each drawn position, of which the first `count` are the row's next
  ones (`NO_TOKEN`, `NO_NUMBERS`: there is none), and log-probabilities; and those of the tokens that follow the ones
  that it read, in the order in which it read them."""

  token: Int[Array, "R K+1"]
  count: Int[Array, " R"]
  logprobs: LogProbs
  scores: LogProbs


def shown_log_probs(every: Float[Array, "N V"], token: Int[Array, " N"], top: int) -> LogProbs:
  """Of all log-probabilities those of these tokens and of the `top` likeliest."""
  values, ids = jax.lax.top_k(every, top)
  own = jnp.take_along_axis(every, jnp.maximum(token, 0)[:, None], -1)
  return LogProbs(own[:, 0], (every > own).sum(-1) + 1, ids.astype(jnp.int32), values)


@dataclasses.dataclass(frozen=True)
class Reading:
  """Where the tokens of a step stand: which row each is of, and where each row's last one is."""

  row_of: Int[Array, "B T"]
  last: Int[Array, " R"]  # among all tokens, flattened

  @classmethod
  def of(cls, counts: Int[Array, " R"], shape: Shape, packed: bool) -> "Reading":
    """Of a step whose rows read `counts` tokens."""
    rows, ends = len(counts), jnp.cumsum(counts)
    if packed and shape.tokens > 1:
      row_of = jnp.searchsorted(ends, jnp.arange(shape.tokens), side="right")
      return cls(jnp.clip(row_of, 0, rows - 1)[None], jnp.maximum(ends - 1, 0))
    row_of = jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, shape.tokens))
    return cls(row_of, jnp.arange(rows) * shape.tokens + jnp.maximum(counts - 1, 0))


def model_under(graph: nnx.GraphDef, params: Params, adapters: Int[Array, "#B #T"] | None) -> Transformer:
  """The model for tokens of which each is under the adapter with this number."""
  return nnx.merge(graph, params if adapters is None else with_adapters(params, adapters))


def step_function(graph: nnx.GraphDef, sizes: Sizes, shape: Shape) -> Callable:
  """step(params, state, batch) -> (state, Drawn): computes the batch's tokens and draws after each row's last, and with
  drafts at each of them and after the last.

  A draft that is what was drawn in its place is a token of the row, and so what was drawn after it: the text is the
  same with any drafts and without.
  """

  def step(params: Params, state: State, batch: Batch):
    adapters_of = lambda slots: None if state.adapters is None else state.adapters[slots]  # noqa: E731
    slots, lengths, counts, wishes, drafted, known = batch.rows
    row, ahead = jnp.arange(len(slots))[:, None], jnp.arange(shape.drafts + 1)
    first = lengths + counts - drafted  # the first position that is drawn
    places = first[:, None] + ahead  # [R, K + 1]
    nowhere = state.tokens.shape[1]
    sent = jnp.where((ahead < drafted[:, None])[:, :-1] & (batch.drafts >= 0), places[:, :-1], nowhere)
    tokens = state.tokens.at[slots[:, None], sent].set(batch.drafts, mode="drop")

    reading = Reading.of(counts, shape, sizes.packed)
    cache = KVCache(state.layers, lengths, counts, batch.tables, state.encoded, known)
    positions = cache.positions(reading.row_of.shape)
    at = lambda positions: tokens.at[slots[reading.row_of], positions].get(mode="clip")  # noqa: E731
    adapters = adapters_of(slots[reading.row_of])
    x, after = model_under(graph, params, adapters).hidden(at(positions), cache=cache)
    x = x.reshape(-1, x.shape[-1])

    read = jnp.maximum(reading.last[:, None] - drafted[:, None] + ahead, 0)  # beyond a row's own: not used
    drawing = model_under(graph, params, adapters_of(jnp.repeat(slots, shape.drafts + 1)[:, None]))
    logits = drawing.logits(x[jnp.minimum(read, len(x) - 1)].reshape(-1, 1, x.shape[-1]))[:, 0]
    token = draw(logits, state.sampling, tokens, slots, places, batch.allowed)
    right = (tokens[slots[:, None], jnp.minimum(places, nowhere - 1)] == token) & (ahead < drafted[:, None])
    count = jnp.cumprod(right, axis=1).sum(1)  # drafts that hold
    where = jnp.where(wishes & DRAWS, first + count, nowhere)
    tokens = tokens.at[slots, where].set(token[row[:, 0], count], mode="drop")

    flat = token.reshape(-1)

    def shows():
      every = log_probs(drawing, logits)
      if sizes.processed:
        of = jnp.repeat(slots, places.shape[1])
        every = state.sampling.take(of).rules.apply(every, places.reshape(-1), tokens[of])
      return shown_log_probs(every, flat, sizes.top)

    shown = _wanted(wishes & SHOWS, len(flat), sizes.top, shows)
    shown = jax.tree.map(lambda a: a.reshape(*token.shape, *a.shape[1:]), shown)
    following = at(positions + 1).reshape(-1)
    scoring = functools.partial(model_under, graph, params)
    adapters = None if adapters is None else adapters.reshape(-1)
    scores = _wanted(wishes & SCORES, len(x), sizes.top, lambda: _scores(scoring, x, following, adapters, sizes.top))
    state = dataclasses.replace(state, layers=after.layers, tokens=tokens, encoded=after.encoded)
    return state, Drawn(token, count + 1, shown, scores)

  return step


def draw(
  logits: Float[Array, "N V"],
  sampling: SamplingRows,
  tokens: Int[Array, "slots T"],
  slots: Int[Array, " R"],
  places: Int[Array, "R D"],
  allowed: UInt32[Array, "R D W"] | None,
) -> Int[Array, "R D"]:
  """The tokens of rows at D places each, by the settings of their slots; N = R * D."""
  deep = places.shape[1]
  repeated = jnp.repeat(slots, deep)
  masks = None if allowed is None else allowed.reshape(-1, allowed.shape[-1])
  token = sampling.take(repeated).draw(logits, places.reshape(-1), tokens[repeated], masks)
  finite = jnp.isfinite(jax.nn.logsumexp(logits, axis=-1))
  return jnp.where(finite, token, NO_NUMBERS).reshape(-1, deep)


def begin(
  state: State,
  slot: Int[Array, ""],
  tokens: Int[Array, " T"],
  sampling: SamplingRows,
  adapter: Int[Array, ""] | None = None,
) -> State:
  """A row with these tokens, none of them computed, settings (of one row) and adapter takes a slot."""
  settings = jax.tree.map(lambda whole, new: whole.at[slot].set(new[0]), state.sampling, sampling)
  adapters = None if state.adapters is None else state.adapters.at[slot].set(adapter)
  tokens = state.tokens.at[slot].set(tokens)
  return dataclasses.replace(state, tokens=tokens, sampling=settings, adapters=adapters)


def encode_function(graph: nnx.GraphDef, dtype: str) -> Callable:
  """encode(params, state, slot, source [1, S], length) -> state: the encoder reads a row's text; the state keeps every
  layer's keys and values of it."""

  def encode(params: Params, state: State, slot, source, length):
    model = model_under(graph, params, None if state.adapters is None else state.adapters[slot][None, None])
    mask = (jnp.arange(source.shape[1]) < length)[None].astype(jnp.int32)
    states = model.encode(source, segment_ids=mask)
    # A decoder's step, of which only what its layers keep of the encoder is computed: nobody reads the rest.
    cache = init_cache(model.config, 1, 1, dtype)
    _, after = model.hidden(jnp.zeros((1, 1), jnp.int32), cache=cache, encoded=states, encoded_segment_ids=mask)
    assert after is not None and after.encoded is not None and state.encoded is not None
    room = state.encoded.segment_ids.shape[1] - source.shape[1]

    def put(whole, new):
      new = jnp.pad(new.astype(whole.dtype), [(0, 0), (0, room), *[(0, 0)] * (new.ndim - 2)])
      return jax.lax.dynamic_update_slice_in_dim(whole, new, slot, 0)

    fresh = dataclasses.replace(after.encoded, states=None)
    return dataclasses.replace(state, encoded=jax.tree.map(put, state.encoded, fresh))

  return encode


def _wanted(wishes: Int[Array, " R"] | Bool[Array, " R"], count: int, top: int, compute: Callable) -> LogProbs:
  nothing = jnp.zeros((count, top))
  none = LogProbs(jnp.zeros(count), jnp.zeros(count, jnp.int32), nothing.astype(jnp.int32), nothing)
  return jax.lax.cond(jnp.any(wishes != 0), compute, lambda: none)


def _scores(
  model_under: Callable[[Int[Array, "n 1"] | None], Transformer],
  x: Float[Array, "N D"],
  following: Int[Array, " N"],
  adapters: Int[Array, " N"] | None,
  top: int,
) -> LogProbs:
  """Log-probabilities of the tokens that follow, some at once."""

  def some(part):
    x, following, adapters = part
    model = model_under(None if adapters is None else adapters[:, None])
    return shown_log_probs(log_probs(model, model.logits(x[:, None])[:, 0]), following, top)

  size = min(AT_ONCE, len(x))
  pad = -len(x) % size
  parts = x, following, adapters
  parts = jax.tree.map(lambda a: jnp.pad(a, [(0, pad), *[(0, 0)] * (a.ndim - 1)]), parts)
  done = jax.lax.map(some, jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), parts))
  return jax.tree.map(lambda a: a.reshape(a.shape[0] * size, *a.shape[2:])[: len(x)], done)
