"""The engine: requests in, tokens out, step by step; see docs/engine.md for the walk of a request."""

import collections
import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine.pages import Pages
from jaxllm.inference.engine.programs import DRAWS, SCORES, SHOWS, Batch, Drawn, Programs, Sizes, buckets, packs
from jaxllm.inference.engine.request import Delta, Request, Row, check_tokens, probabilities
from jaxllm.inference.engine.scheduler import Plan, Scheduler
from jaxllm.inference.sampling import SamplingParams, sampling_rows
from jaxllm.kernels import backends
from jaxllm.models.build import Params, declare, unstack_layers
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.weights import cast
from jaxllm.parallel.config import AxisRules
from jaxllm.parallel.sharding import param_shardings

log = logging.getLogger("jaxllm")


class Engine:
  """Owns a model's weights, its pages and its compiled programs; many requests share every step.

  It is of one thread: whoever calls `submit`, `abort` and `step` from several takes a lock.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    *,
    compute: Compute = Compute(),
    mesh: Mesh | None = None,
    rules: AxisRules = AxisRules(),
    max_num_seqs: int = 16,
    max_model_len: int | None = None,
    num_pages: int | Mapping[str, int] | None = None,
    page_size: int = 16,
    max_tokens_per_step: int = 512,
    kv_dtype: str | None = None,
    max_logprobs: int = 20,
    prefix_cache: bool = True,
    overlap: bool = True,
    row_buckets: Sequence[int] | None = None,
    token_buckets: Sequence[int] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
  ):
    """
    Args:
      params: stacked or per layer; they get `compute.dtype`.
      mesh: devices over which weights and pages are split by `rules`, a step's tokens being whole on each.
      max_num_seqs: rows of a step at most. max_model_len: tokens of a request, at most the model's.
      num_pages: of each kind of layer; None: as many as `max_num_seqs` requests of `max_model_len` tokens need.
      page_size: tokens of a page.
      max_tokens_per_step: a prompt that is longer is read in several steps, beside the tokens of the others.
      kv_dtype: of keys and values; also "int8" and "float8_e4m3fn". None: `compute.dtype`, but on CPUs float32, which
        holds the same numbers.
      max_logprobs: the most that a request may ask for.
      prefix_cache: whether requests share the pages of a beginning that they have in common.
      overlap: a step is scheduled while the one before is computed; what is drawn is seen one step late.
      row_buckets, token_buckets: rows of steps that only decode, and tokens of the others, for which programs are
        compiled; None: powers of two.
      compiler_options: of XLA.

    Raises:
      ConfigError: the model writes no text, or a size is impossible.
    """
    if config.architecture == "encoder" or config.head != "lm":
      raise ConfigError("this model has no head that writes text; it can encode, embed or classify texts")
    longest = config.max_seq_len if max_model_len is None else max_model_len
    for name, value, most in (
      ("max_num_seqs", max_num_seqs, None),
      ("max_model_len", longest, config.max_seq_len),
      ("page_size", page_size, None),
      ("max_tokens_per_step", max_tokens_per_step, None),
    ):
      if value < 1 or most is not None and value > most:
        raise ConfigError(f"{name} is {value}; it must be at least 1" + (f" and at most {most}" if most else ""))
    self.config, self.compute, self.version, self._overlap = config, compute, "0", overlap
    self._mesh, self._rules, self._longest = mesh, rules, longest
    self._params = self._placed(params)
    sizes = self._sizes(max_num_seqs, page_size, max_tokens_per_step, num_pages, row_buckets, token_buckets)
    # XLA for CPU of jax 0.10 goes through all 16-bit pages for each token that it writes: 170 tokens a second became 95
    # (SmolLM2-135M, 8 rows, 200 pages), and fewer with more pages.
    own = "float32" if backends.TARGETS[compute.target] == "cpu" else compute.dtype
    sizes = dataclasses.replace(sizes, kv_dtype=kv_dtype or own, top=min(max_logprobs, config.vocab_size))
    self._pages = Pages(
      sizes.pages, page_size, window=config.sliding_window, sink_tokens=config.sink_tokens, share=prefix_cache
    )
    self._scheduler = Scheduler(self._pages, max_num_seqs, max_tokens_per_step, sizes.tokens[-1], self._facts)
    place = next(iter(jax.tree.leaves(self._params)[0].devices())) if mesh is None else mesh
    self._programs = Programs(config, compute, place, sizes, rules, compiler_options)
    self._state = self._programs.empty()
    self._settings = sampling_rows([SamplingParams(temperature=0, seed=0)] * max_num_seqs, [0] * max_num_seqs)
    self._sampling = self._programs.put(jax.tree.map(np.copy, self._settings))
    self._rows: dict[int, Row] = {}
    self._numbers = itertools.count()
    self._flight: collections.deque[tuple[Plan, list[int], Drawn]] = collections.deque()
    self._early: list[Delta] = []  # of requests that ended outside `step`
    held = sum(x.nbytes for x in jax.tree.leaves(self._state.layers))
    log.info("engine: %s pages of %d tokens, %.2f GiB of keys and values", sizes.pages, page_size, held / 2**30)

  @classmethod
  def of(cls, model: Any, **settings) -> "Engine":
    """Of a loaded `jaxllm.inference.model.Model`, sharing its weights."""
    from flax import nnx

    compute = nnx.merge(model.graph, model._weights).compute
    return cls(model.config, model._weights, **{"compute": compute, **settings})

  @property
  def busy(self) -> bool:
    """Whether `step` has anything left to do or to say."""
    return bool(self._rows or self._flight or self._early)

  def warm_up(self) -> None:
    """Compiles every program that any request may need; before that the engine compiles as it goes."""
    self._programs.warm_up(self._params, self._state, self._sampling)

  def submit(self, request: Request) -> int:
    """Takes a request in; its number, which its deltas bear.

    Raises:
      ConfigError: it can never be served, and why: empty, too long for the model or for the pages, tokens that the
        model has not, or more log-probabilities than `max_logprobs`.
    """
    return self._submit(request, draws=True)

  def abort(self, number: int) -> None:
    """Ends a request; its last delta says "abort". One that is over, or never was, is left alone."""
    row = self._rows.get(number)
    if row is not None:
      self._end(row)
      self._early.append(Delta(number, finish_reason="abort"))

  def step(self) -> list[Delta]:
    """Schedules and starts a step, and gives back what the one before has drawn (without `overlap`: this one)."""
    deltas, self._early = self._early, []
    plan = self._scheduler.schedule()
    if plan.work:
      self._start(plan)
    elif not self._flight and self._rows:
      raise RuntimeError("the scheduler has requests, nothing to do and nothing to wait for")
    while len(self._flight) > (1 if self._overlap and plan.work else 0):
      deltas += self._read(*self._flight.popleft())
    return deltas

  def load_weights(self, params: Params, version: str) -> None:
    """Goes on with other weights of the same shapes. Requests keep the tokens that they have, whose keys and values
    are computed again; pages of the old weights are not found any more."""
    while self._flight:
      self._early += self._read(*self._flight.popleft())
    self._params, self.version = self._placed(params), version
    self._scheduler.restart()

  def score(self, texts: Sequence[Sequence[int]]) -> list[Float32[np.ndarray, " T-1"]]:
    """Of each text's tokens from the second on the log-probability, in nats, given those before it. Other requests go
    on meanwhile; the next `step` says what they gained.

    Raises:
      ConfigError: as `submit`; nothing is scored then.
    """
    if self.config.architecture != "decoder":
      raise ConfigError("score is of decoders: an encoder_decoder's prompt has no probability")
    found: dict[int, list[float]] = {}
    asked: dict[int, Sequence[int]] = {}
    try:
      for text in texts:
        asked[self._submit(Request(text, prompt_logprobs=0), draws=False)] = text
    except ConfigError:
      for number in asked:
        self.abort(number)
      self._early = [delta for delta in self._early if delta.id not in asked]
      raise
    found, others = {number: [] for number in asked}, []
    while any(number in self._rows for number in asked):
      for delta in self.step():
        if delta.id not in asked:
          others.append(delta)
        for shown in delta.prompt_logprobs or () if delta.id in asked else ():
          values = found[delta.id]
          values.append(shown[int(asked[delta.id][len(values) + 1])])
    self._early = others + [delta for delta in self._early if delta.id not in asked]
    return [np.asarray(values, np.float32) for values in found.values()]

  def stats(self) -> dict[str, int]:
    """Counts of now and since the start; `prefix_*` in tokens, `pages_free` with those that hold shareable text."""
    s = self._scheduler
    return {
      "running": len(s.running),
      "waiting": len(s.waiting),
      "preemptions": s.preemptions,
      "prefix_queries": s.prefix_queries,
      "prefix_hits": s.prefix_hits,
      "pages_free": self._pages.available,
      "pages_total": self._pages.total,
      "compilations": self._programs.compilations,
    }

  # ---------------------------------------------------------------- a step

  def _start(self, plan: Plan) -> None:
    """Sends a step to the device and does not wait for it."""
    for row in plan.admitted:
      self._state = self._programs.begin(self._state, row.slot, row.tokens)
      if self.config.architecture == "encoder_decoder":
        self._state = self._programs.encode(self._params, self._state, row.slot, row.request.prompt)
      one = sampling_rows([row.settings], [row.request.index])
      jax.tree.map(lambda whole, new, slot=row.slot: whole.__setitem__(slot, new[0]), self._settings, one)
    if plan.admitted:
      self._sampling = self._programs.put(jax.tree.map(np.copy, self._settings))  # the device may read it later
    counts = [work.count for work in plan.work]
    rows, tokens = self._programs.shape_for(counts)
    by_slot = self.config.architecture == "encoder_decoder"  # where rows lie as the encoder's keys do
    places = [work.row.slot if by_slot else i for i, work in enumerate(plan.work)]
    facts, missing = np.zeros((4, rows), np.int32), {kind: pool.count + 1 for kind, pool in self._pages.pools.items()}
    tables = {kind: np.full((rows, self._programs.sizes.max_pages), n, np.int32) for kind, n in missing.items()}
    for place, work in zip(places, plan.work):
      facts[:, place] = np.asarray([work.row.slot, work.start, work.count, self._wishes(work)])
      for kind, pages in work.row.held.pages.items():
        tables[kind][place, : len(pages)] = pages
    arguments = self._state, self._programs.put(Batch(facts, tables)), self._sampling
    self._state, drawn = self._programs.step(self._params, *arguments, tokens)
    self._flight.append((plan, places, drawn))

  def _wishes(self, work) -> int:
    shows = work.draws and work.row.settings.logprobs is not None
    scores = work.row.request.prompt_logprobs is not None and work.row.scored < work.row.begins
    return DRAWS * work.draws | SHOWS * shows | SCORES * scores

  def _read(self, plan: Plan, places: list[int], drawn: Drawn) -> list[Delta]:
    """Waits for a step and takes what it has drawn; of rows that have ended meanwhile it is left out."""
    wishes = [self._wishes(work) for work in plan.work]
    token = np.asarray(drawn.token)
    shown = jax.tree.map(np.asarray, drawn.logprobs) if any(wish & SHOWS for wish in wishes) else None
    scores = jax.tree.map(np.asarray, drawn.scores) if any(wish & SCORES for wish in wishes) else None
    starts = np.cumsum([0, *(work.count for work in plan.work)])
    if not self._programs.packed:
      starts = np.asarray(places) * (0 if scores is None else len(scores.token) // len(token))
    deltas = []
    for work, place, start, wish in zip(plan.work, places, starts, wishes):
      row = work.row
      row.pending -= work.draws
      if row.finished:
        continue
      scored = self._scored(work, start, scores) if wish & SCORES else None
      if work.draws:
        deltas.append(self._take(row, int(token[place]), place, shown, scored))
      elif row.limit == row.begins and row.scored == row.begins:
        self._end(row)
        deltas.append(Delta(row.id, prompt_logprobs=scored, finish_reason="length"))
      elif scored:
        deltas.append(Delta(row.id, prompt_logprobs=scored))
    return deltas

  def _take(self, row: Row, token: int, place: int, shown, scored) -> Delta:
    if token < 0:
      self._end(row, spoiled=True)
      error = "the model's logits are no numbers after this text: its weights or a kernel are broken"
      return Delta(row.id, prompt_logprobs=scored, finish_reason="error", error=error)
    reason, stop = row.take(token)
    if reason is not None:
      self._end(row)
    elif row.slot is not None:
      self._scheduler.know(row)
    logprobs = None
    if row.settings.logprobs is not None:
      top = shown.top_ids[place], shown.top[place]
      logprobs = (probabilities(token, shown.token[place], top, row.settings.logprobs),)
    return Delta(row.id, (token,), logprobs, scored, reason, stop)

  def _scored(self, work, start: int, scores) -> tuple[dict[int, float], ...]:
    """Of the tokens after those that the step has read; after a preemption some are known already."""
    row, found = work.row, []
    for i in range(work.count):
      position = work.start + i + 1
      if row.scored <= position < row.begins:
        top = scores.top_ids[start + i], scores.top[start + i]
        count = row.request.prompt_logprobs
        found.append(probabilities(row.tokens[position], scores.token[start + i], top, count))
        row.scored += 1
    return tuple(found)

  # ---------------------------------------------------------------- requests and weights

  def _submit(self, request: Request, draws: bool) -> int:
    c, longest = self.config, self._longest
    for name, value in (("logprobs", request.sampling.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
      if value is not None and value > self._programs.sizes.top:
        raise ConfigError(f"{name} is {value}; this engine gives up to {self._programs.sizes.top} (max_logprobs)")
    if request.sampling.num_beams > 1:
      raise ConfigError("num_beams: the engine draws; beam search is a client of its own")
    if c.architecture == "encoder_decoder":
      if request.prompt_logprobs is not None:
        raise ConfigError("prompt_logprobs: an encoder_decoder's prompt has no probability")
      prompt = check_tokens(request.prompt, "the prompt", c.vocab_size, c.max_seq_len, "model.max_seq_len")
      first = [c.decoder_start_id]
    else:
      most = longest - 1 if draws else longest
      prompt = first = check_tokens(request.prompt, "the prompt", c.vocab_size, most, f"max_model_len {longest}")
    room = longest - len(first)
    limit = len(first) + (min(room, request.sampling.max_tokens or room) if draws else 0)
    row = Row(next(self._numbers), dataclasses.replace(request, prompt=tuple(prompt)), first, limit)
    if row.left < 1:  # a single token to score
      self._early.append(Delta(row.id, finish_reason="length"))
      return row.id
    self._scheduler.add(row)
    self._rows[row.id] = row
    return row.id

  def _end(self, row: Row, spoiled: bool = False) -> None:
    self._scheduler.finish(row, spoiled)
    del self._rows[row.id]

  def _facts(self, row: Row) -> tuple:
    source = row.request.prompt if self.config.architecture == "encoder_decoder" else ()
    return self.version, row.request.salt, source

  def _placed(self, params: Params) -> Params:
    """The weights as they compute: each layer apart, in the engine's dtype, on its devices."""
    if self._mesh is None:
      params = jax.device_put(params)  # arrays stay on the device where they are
    else:
      _, shapes, axes = declare(self.config, self.compute)
      params = jax.device_put(params, param_shardings(shapes, axes, self._mesh, self._rules))
    return cast(unstack_layers(params), self.compute.dtype)

  def _sizes(self, rows, page_size, step_tokens, num_pages, row_buckets, token_buckets) -> Sizes:
    c = self.config
    kinds = sorted({"local" if kind == "local" else "global" for kind in c.layer_kinds})
    every = -(-self._longest // page_size) * rows
    if isinstance(num_pages, Mapping):
      pages = {kind: num_pages[kind] for kind in kinds}
    else:
      pages = dict.fromkeys(kinds, every if num_pages is None else num_pages)
    if num_pages is None and "local" in kinds:
      seen = c.sliding_window + c.sink_tokens + step_tokens + 2 * page_size
      pages["local"] = min(every, -(-seen // page_size) * rows)
    if min(pages.values()) < 1:
      raise ConfigError(f"num_pages is {num_pages}; it must be at least 1 of each kind: {', '.join(kinds)}")
    # XLA:CPU multiplies a single 16-bit row in a scalar loop; two rows take its fast path.
    few = 2 if backends.TARGETS[self.compute.target] == "cpu" and self.compute.dtype != "float32" else 1
    most = step_tokens if packs(c) else max(1, step_tokens // rows)
    least = min(16, most) if packs(c) else most
    decode, mixed = (
      tuple(sorted({*(n for n in asked or buckets(low, high) if n < high), high}))
      for asked, low, high in ((row_buckets, few, max(few, rows)), (token_buckets, least, most))
    )
    return Sizes(rows, self._longest, page_size, pages, self.compute.dtype, decode, mixed, 0)
