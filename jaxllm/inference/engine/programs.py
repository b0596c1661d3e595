"""What the engine runs on the device: one step, a row's beginning, an encoder's reading; every shape compiled once.

The device keeps each row's tokens (`State.tokens`), by the row's slot: the host says only which positions a step reads,
and what a step draws is there for the next one before the host has seen it.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxllm.inference.sampling import SamplingRows
from jaxllm.models.build import Params, declare
from jaxllm.models.caches import Encoded, KVCache, init_cache, init_paged_cache
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.stores import Store
from jaxllm.models.transformer import Transformer
from jaxllm.parallel.config import AxisRules
from jaxllm.parallel.sharding import activation_sharding, replicated

log = logging.getLogger("jaxllm")

SMALLEST = 16  # tokens of the smallest packed step, and of the smallest text that an encoder reads
AT_ONCE = 64  # tokens of a prompt whose logits are in memory at once
DRAWS, SHOWS, SCORES = 1, 2, 4  # what a row wants: a token; its log-probabilities; those of the tokens it reads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """What stays on the device from step to step; every program takes it as a donation."""

  layers: tuple[Store, ...]
  tokens: Int[Array, "slots max_model_len"]
  encoded: Encoded | None  # of an encoder_decoder, by slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """A step as the host sends it: of each row its slot, tokens in the cache, tokens to compute, and wishes."""

  rows: Int[Array | np.ndarray, "4 R"]
  tables: dict[str, Int[Array | np.ndarray, "R max_pages"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogProbs:
  """In nats, at temperature 1: of a token, and the likeliest ones; zeros where nobody wants them."""

  token: Float[Array, " R"]
  top_ids: Int[Array, "R top"]
  top: Float[Array, "R top"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
  """What a step gives back: of each row a token, -1 where the logits are no numbers, and log-probabilities; and those
  of the tokens that follow the ones that it read, in the order in which it read them."""

  token: Int[Array, " R"]
  logprobs: LogProbs
  scores: LogProbs


def log_probs(logits: Float[Array, "R V"], token: Int[Array, " R"], top: int) -> LogProbs:
  """Log-probabilities of these tokens and of the `top` likeliest."""
  every = jax.nn.log_softmax(logits, axis=-1)
  values, ids = jax.lax.top_k(every, top)
  return LogProbs(jnp.take_along_axis(every, token[:, None], -1)[:, 0], ids.astype(jnp.int32), values)


def packs(config: ModelConfig) -> bool:
  """Whether the tokens of a step may stand back to back; relative positions, sink tokens and cross-attention need them
  row by row."""
  return config.architecture == "decoder" and config.position != "relative" and not config.sink_tokens


def buckets(low: int, high: int) -> tuple[int, ...]:
  """`low` times powers of two, and `high`."""
  sizes = [high]
  while low < high:
    sizes.append(low)
    low *= 2
  return tuple(sorted(sizes))


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The shapes of an engine; `rows` and `tokens` are those of its steps, in ascending order."""

  slots: int
  max_model_len: int
  page_size: int
  pages: dict[str, int]
  kv_dtype: str
  rows: tuple[int, ...]  # of steps with one token a row
  tokens: tuple[int, ...]  # of other steps: packed, or of each row
  top: int  # log-probabilities of the likeliest tokens

  @property
  def max_pages(self) -> int:
    return -(-self.max_model_len // self.page_size)


class Programs:
  """The compiled programs of one engine, and the state that they start from."""

  def __init__(
    self,
    config: ModelConfig,
    compute: Compute,
    place: jax.Device | Mesh,
    sizes: Sizes,
    rules: AxisRules = AxisRules(),
    options: Mapping[str, Any] | None = None,
  ):
    self.config, self.compute, self.sizes, self.packed = config, compute, sizes, packs(config)
    self.compilations, self.ready = 0, False
    self._mesh = place if isinstance(place, Mesh) else None
    self._rules = dataclasses.replace(rules, batch=(), seq=())  # a step's tokens are whole
    self._graph = declare(config, compute)[0]
    self._options = None if options is None else dict(options)  # of the compiler
    self._compiled: dict[tuple, Any] = {}
    self._whole = replicated(place) if isinstance(place, Mesh) else place

  def empty(self) -> State:
    """The state of an engine without requests."""

    def make():
      c, s = self.config, self.sizes
      pages = {kind: count + 1 for kind, count in s.pages.items()}  # and the one that is nobody's
      cache = init_paged_cache(
        c, 1, s.max_model_len, pages=pages, page_size=s.page_size, dtype=s.kv_dtype, target=self.compute.target
      )
      encoded = None
      if c.architecture == "encoder_decoder":
        shape = s.slots, c.max_seq_len, c.num_kv_heads, c.head_dim
        layers = tuple((jnp.zeros(shape, self.compute.dtype),) * 2 for _ in range(c.num_layers))
        encoded = Encoded(None, jnp.zeros(shape[:2], jnp.int32), layers)
      return State(cache.layers, jnp.zeros((s.slots, s.max_model_len), jnp.int32), encoded)

    with jax.default_device(None if self._mesh else self._whole):
      return jax.jit(self._on_mesh(make))()

  def put(self, tree: Any) -> Any:
    """Arrays of the host where all devices see them."""
    return jax.device_put(tree, self._whole)

  def shape_for(self, counts: Sequence[int]) -> tuple[int, int]:
    """The smallest step for rows with so many tokens: its rows, and its tokens (of each row, if it is not packed; 1
    with as many rows: decoding)."""
    s, most = self.sizes, max(counts)
    rows = next(n for n in s.rows if n >= len(counts))
    if most == 1:
      return (rows, 1) if self.config.architecture != "encoder_decoder" else (s.rows[-1], 1)
    if not self.packed:
      return s.rows[-1], next(n for n in s.tokens if n >= most)
    tokens = next(n for n in s.tokens if n >= sum(counts))
    return min(s.rows[-1], tokens), tokens

  def shapes(self) -> list[tuple[int, int]]:
    """All that `shape_for` gives."""
    s = self.sizes
    decode = [(n, 1) for n in (s.rows if self.config.architecture != "encoder_decoder" else s.rows[-1:])]
    return decode + [(min(s.rows[-1], n) if self.packed else s.rows[-1], n) for n in s.tokens]

  def step(
    self, params: Params, state: State, batch: Batch, sampling: SamplingRows, tokens: int
  ) -> tuple[State, Drawn]:
    """Computes the batch's tokens and draws after each row's last; `tokens` as `shape_for` says it."""
    arguments = params, state, batch, sampling
    return self._program(("step", batch.rows.shape[1], tokens), self._step(tokens), arguments)(*arguments)

  def begin(self, state: State, slot: int, tokens: Sequence[int]) -> State:
    """A row with these tokens, none of them computed, takes a slot."""
    row = np.zeros(self.sizes.max_model_len, np.int32)
    row[: len(tokens)] = tokens
    arguments = state, *self.put((np.int32(slot), row))
    return self._program(("begin",), _begin, arguments)(*arguments)

  def encode(self, params: Params, state: State, slot: int, source: Sequence[int]) -> State:
    """The encoder reads a row's text; the state keeps every layer's keys and values of it."""
    length = next(n for n in self._source_lengths() if n >= len(source))
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(source)] = source
    arguments = params, state, *self.put((np.int32(slot), tokens, np.int32(len(source))))
    return self._program(("encode", length), self._encode, arguments)(*arguments)

  def warm_up(self, params: Params, state: State, sampling: SamplingRows) -> None:
    """Compiles all programs that are missing, and says how long it took; a compilation after that is a fault of ours,
    which is logged and counted."""
    start, lowered = time.perf_counter(), {}
    for key, function, arguments in self._all(params, state, sampling):
      if key not in self._compiled:
        lowered[key] = self._lower(function, arguments)
    with ThreadPoolExecutor() as pool:
      self._compiled |= dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values())))
    self.compilations += len(lowered)
    self.ready = True
    log.info("engine: %d programs ready in %.1f s", len(lowered), time.perf_counter() - start)

  def _all(self, params, state, sampling) -> Iterator[tuple[tuple, Callable, tuple]]:
    for rows, tokens in self.shapes():
      empty = np.zeros((rows, self.sizes.max_pages), np.int32)
      batch = self.put(Batch(np.zeros((4, rows), np.int32), dict.fromkeys(self.sizes.pages, empty)))
      yield ("step", rows, tokens), self._step(tokens), (params, state, batch, sampling)
    number, row = self.put((np.int32(0), np.zeros(self.sizes.max_model_len, np.int32)))
    yield ("begin",), _begin, (state, number, row)
    for length in self._source_lengths():
      source = self.put(np.zeros((1, length), np.int32))
      yield ("encode", length), self._encode, (params, state, number, source, number)

  def _source_lengths(self) -> tuple[int, ...]:
    if self.config.architecture != "encoder_decoder":
      return ()
    return buckets(SMALLEST, self.config.max_seq_len)

  def _program(self, key, function, arguments):
    if key not in self._compiled:
      if self.ready:
        log.warning("engine: a program of shape %s was not compiled at the start", key)
      self._compiled[key] = self._lower(function, arguments).compile()
      self.compilations += 1
    return self._compiled[key]

  def _lower(self, function, arguments):
    state = next(one for one in arguments if isinstance(one, State))
    stays = jax.tree.map(lambda x: x.sharding, state)
    out = (stays, None) if function not in (_begin, self._encode) else stays
    donated = next(i for i, one in enumerate(arguments) if one is state)
    how = dict(donate_argnums=donated, out_shardings=out, compiler_options=self._options)
    return jax.jit(self._on_mesh(function), **how).lower(*arguments)

  def _on_mesh(self, function):
    if self._mesh is None:
      return function

    def run(*arguments):
      with activation_sharding(self._mesh, self._rules):
        return function(*arguments)

    return run

  def _step(self, tokens: int) -> Callable:
    def step(params, state: State, batch: Batch, sampling: SamplingRows):
      model: Transformer = nnx.merge(self._graph, params)
      slots, lengths, counts, wishes = batch.rows
      cache = KVCache(state.layers, lengths, counts, batch.tables, state.encoded)
      shape = (1, tokens) if self.packed and tokens > 1 else (len(slots), tokens)
      positions = cache.positions(shape)
      ends, index = jnp.cumsum(counts), jnp.arange(tokens)
      if shape[0] == len(slots) and (tokens == 1 or not self.packed):
        row_of = jnp.broadcast_to(jnp.arange(len(slots))[:, None], shape)
        last = jnp.arange(len(slots)) * tokens + jnp.maximum(counts - 1, 0)
      else:
        row_of = jnp.clip(jnp.searchsorted(ends, index, side="right"), 0, len(slots) - 1)[None]
        last = jnp.maximum(ends - 1, 0)
      at = lambda positions: state.tokens.at[slots[row_of], positions].get(mode="clip")  # noqa: E731
      x, after = model.hidden(at(positions), cache=cache)
      x = x.reshape(-1, x.shape[-1])

      logits = model.logits(x[last][:, None])[:, 0]
      position = lengths + counts  # of the token that is drawn
      token = jax.tree.map(lambda a: a[slots], sampling).draw(logits, position)
      token = jnp.where(jnp.isfinite(jax.nn.logsumexp(logits, -1)), token, -1)
      where = jnp.where(wishes & DRAWS, position, state.tokens.shape[1])
      known = state.tokens.at[slots, where].set(token, mode="drop")
      shown = self._wanted(wishes & SHOWS, len(slots), lambda: log_probs(logits, token, self.sizes.top))
      following = at(positions + 1).reshape(-1)
      scores = self._wanted(wishes & SCORES, len(x), lambda: self._scores(model, x, following))
      return State(after.layers, known, after.encoded), Drawn(token, shown, scores)

    return step

  def _wanted(self, wishes, count: int, compute: Callable[[], LogProbs]) -> LogProbs:
    nothing = jnp.zeros((count, self.sizes.top))
    none = LogProbs(jnp.zeros(count), nothing.astype(jnp.int32), nothing)
    return jax.lax.cond(jnp.any(wishes != 0), compute, lambda: none)

  def _scores(self, model: Transformer, x: Float[Array, "N D"], following: Int[Array, " N"]) -> LogProbs:
    """Log-probabilities of the tokens that follow, some at once."""

    def some(part):
      return log_probs(model.logits(part[0][:, None])[:, 0], part[1], self.sizes.top)

    size = min(AT_ONCE, len(x))
    pad = -len(x) % size
    parts = jnp.pad(x, ((0, pad), (0, 0))), jnp.pad(following, (0, pad))
    done = jax.lax.map(some, jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), parts))
    return jax.tree.map(lambda a: a.reshape(a.shape[0] * size, *a.shape[2:])[: len(x)], done)

  def _encode(self, params, state: State, slot, source, length):
    model: Transformer = nnx.merge(self._graph, params)
    mask = (jnp.arange(source.shape[1]) < length)[None].astype(jnp.int32)
    states = model.encode(source, segment_ids=mask)
    # A decoder's step, of which only what its layers keep of the encoder is computed: nobody reads the rest.
    cache = init_cache(self.config, 1, 1, self.compute.dtype)
    _, after = model.hidden(jnp.zeros((1, 1), jnp.int32), cache=cache, encoded=states, encoded_segment_ids=mask)
    room = state.encoded.segment_ids.shape[1] - source.shape[1]

    def put(whole, new):
      new = jnp.pad(new.astype(whole.dtype), [(0, 0), (0, room), *[(0, 0)] * (new.ndim - 2)])
      return jax.lax.dynamic_update_slice_in_dim(whole, new, slot, 0)

    assert after is not None and after.encoded is not None
    fresh = dataclasses.replace(after.encoded, states=None)
    return dataclasses.replace(state, encoded=jax.tree.map(put, state.encoded, fresh))


def _begin(state: State, slot, row) -> State:
  return dataclasses.replace(state, tokens=state.tokens.at[slot].set(row))
