"""The engine: requests in, tokens out, step by step; see docs/engine.md for the walk of a request."""

import collections
import dataclasses
import itertools
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float32

from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine.adapters import Adapters, one_each
from jaxllm.inference.engine.dispatch import Arranged, Gained, arrange, gained
from jaxllm.inference.engine.drafting import check_draft
from jaxllm.inference.engine.memory import affordable, free_bytes, page_bytes
from jaxllm.inference.engine.pages import Pages
from jaxllm.inference.engine.programs import Programs
from jaxllm.inference.engine.request import Delta, FinishReason, Request, Row, check_tokens
from jaxllm.inference.engine.scheduler import Plan, Scheduler
from jaxllm.inference.engine.sizes import Sizes, engine_sizes
from jaxllm.inference.engine.speculation import DraftModel, Speculation, Speculator
from jaxllm.inference.engine.steps import NO_NUMBERS, Drawn
from jaxllm.inference.params import SamplingParams
from jaxllm.inference.prompts import room_for
from jaxllm.models.build import Params, declare, described, unstack_layers
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.multi_lora import Adapter
from jaxllm.models.weights import cast
from jaxllm.parallel import agreement
from jaxllm.parallel.config import AxisRules

log = logging.getLogger("jaxllm")


class Engine:
  """Owns a model's weights, its pages and its compiled programs; many requests share every step.

  It is of one thread: whoever calls `submit`, `abort` and `step` from several takes a lock. Over a mesh of several
  processes all of them make the same calls in the same order, and all see every token.
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
    max_source_len: int | None = None,
    num_pages: int | Mapping[str, int] | None = None,
    page_size: int = 16,
    max_tokens_per_step: int | None = None,
    kv_dtype: str | None = None,
    max_logprobs: int = 20,
    processed_logprobs: bool = False,
    max_biases: tuple[int, int] = (300, 8),
    prefix_cache: bool = True,
    overlap: bool = True,
    row_buckets: Sequence[int] | None = None,
    token_buckets: Sequence[int] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    speculative: Speculation | None = None,
    adapters: Mapping[str, Adapter] | None = None,
  ):
    """
    Args:
      params: stacked or per layer; they get `compute.dtype`.
      mesh: devices over which weights and pages are split by `rules`, a step's tokens being whole on each.
      max_num_seqs: rows of a step at most. max_model_len: tokens of a request; None: the model's max_seq_len, which
        is also the most unless its positions are relative.
      max_source_len: tokens of an encoder_decoder's prompt, likewise; None: no fewer than max_model_len.
      num_pages: of each kind of layer; None: as many as `max_num_seqs` requests of `max_model_len` tokens need, if
        there is memory for them.
      page_size: tokens of a page.
      max_tokens_per_step: a prompt that is longer is read in several steps, beside the tokens of the others. None:
        512, or fewer if no more are ever there.
      kv_dtype: of keys and values; also "int8" and "float8_e4m3fn". None: `compute.dtype`, but on CPUs float32, which
        holds the same numbers.
      max_logprobs: the most that a request may ask for.
      processed_logprobs: those of drawn tokens are after penalties, biases and masks, and not normalized again.
      max_biases: how many biased tokens and banned sequences a request may have, and of how many tokens.
      prefix_cache: whether requests share the pages of a beginning that they have in common.
      overlap: a step is scheduled while the one before is computed; what is drawn is seen one step late.
      row_buckets, token_buckets: rows of steps that only decode, and tokens of the others, for which programs are
        compiled; None: powers of two.
      compiler_options: of XLA.
      speculative: guesses that are checked many at once; no step is scheduled ahead then, as with `overlap` False.
      adapters: by the names under which requests ask for them, each as `multi_lora.adapter_of` makes it of a tree of
        parameters; all of this model.

    Raises:
      ConfigError: the model writes no text, a size is impossible, or an adapter does not fit.
    """
    if config.architecture == "encoder" or config.head != "lm":
      raise ConfigError("this model has no head that writes text; it can encode, embed or classify texts")
    if compute.batch_invariant and mesh is not None and mesh.size > 1:
      raise ConfigError(f"compute.batch_invariant is for one CPU device, not a mesh of {mesh.size}")
    self.config, self.compute, self.version, self._overlap = config, compute, "0", overlap
    self._mesh, self._rules = mesh, rules
    self._lockstep = mesh is not None and mesh.is_multi_process
    self._adapters = Adapters(config, adapters or {}, compute.dtype)
    self._params = self._placed(params)
    place = next(iter(jax.tree.leaves(self._params)[0].devices())) if mesh is None else mesh
    sizes = engine_sizes(
      config,
      compute,
      max_num_seqs=max_num_seqs,
      max_model_len=max_model_len,
      max_source_len=max_source_len,
      num_pages=num_pages,
      page_size=page_size,
      max_tokens_per_step=max_tokens_per_step,
      kv_dtype=kv_dtype,
      max_logprobs=max_logprobs,
      processed_logprobs=processed_logprobs,
      max_biases=max_biases,
      max_drafts=0 if speculative is None else speculative.num_speculative_tokens,
      row_buckets=row_buckets,
      token_buckets=token_buckets,
    )
    window = dict(window=config.sliding_window, sink_tokens=config.sink_tokens)
    if num_pages is None:
      sizes = dataclasses.replace(sizes, pages=self._afforded(sizes, place, Pages(sizes.pages, page_size, **window)))
    self.sizes = sizes
    self._pages = Pages(sizes.pages, page_size, share=prefix_cache, **window)
    limits = max_num_seqs, sizes.step_tokens, sizes.tokens[-1]
    scaling = config.rope_scaling
    self._reread_beyond = config.rope_switch if scaling is not None and scaling.kind == "longrope" else None
    self._scheduler = Scheduler(self._pages, *limits, self._facts, self._encoded_in, self._reread_beyond)
    self._speculator = None if speculative is None else Speculator(speculative, sizes, timed=not self._lockstep)
    self._draft_params: Params | None = None
    draft = None if speculative is None else speculative.draft
    if draft is not None:
      check_draft(draft.config, config, sizes.max_model_len)
      self._draft_params = self._placed(draft.params, draft)
    self._programs = Programs(config, compute, place, sizes, rules, compiler_options, draft, bool(self._adapters))
    self._state = self._programs.empty()
    self._encoded: dict[int, tuple[int, Sequence[int]]] = {}  # by slot: adapter and prompt whose encoding lies there
    self._rows: dict[int, Row] = {}
    self._numbers = itertools.count()
    self._flight: collections.deque[tuple[Arranged, Drawn, float]] = collections.deque()
    self._early: list[Delta] = []  # of requests that ended outside `step`
    held = sum(x.nbytes for x in jax.tree.leaves(self._state.layers))
    log.info("engine: %s pages of %d tokens, %.2f GiB of keys and values", sizes.pages, page_size, held / 2**30)

  @classmethod
  def of(cls, model: Any, **settings) -> "Engine":
    """Of a loaded `jaxllm.inference.model.Model`, sharing its weights."""
    return cls(model.config, model._weights, **{"compute": model.compute, **settings})

  @property
  def busy(self) -> bool:
    """Whether `step` has anything left to do or to say."""
    return bool(self._rows or self._flight or self._early)

  def warm_up(self) -> None:
    """Compiles every program that any request may need; before that the engine compiles as it goes."""
    self._programs.warm_up(self._params, self._state, self._draft_params)

  def submit(self, request: Request) -> int:
    """Takes a request in; its number, which its deltas bear.

    Raises:
      ConfigError: it can never be served, and why: empty, too long for the model or for the pages, tokens that the
        model has not, or more log-probabilities than `max_logprobs`.
    """
    return self._submit(request, draws=True)

  def abort(self, number: int) -> Delta | None:
    """Ends a request; its last delta, which `step` does not give again. None: it is over, or never was."""
    row = self._rows.get(number)
    return None if row is None else self._last(row, "abort")

  def step(self) -> list[Delta]:
    """Schedules and starts a step, and gives back what the one before has drawn (without `overlap`: this one)."""
    if self._speculator is not None:
      self._speculator.propose(self._scheduler.running, self._scheduler.steady)
    plan = self._scheduler.schedule()
    if plan.work:
      try:
        self._start(plan)
      except BaseException:
        self._undo(plan)
        raise
    elif not self._flight and self._rows:
      raise RuntimeError("the scheduler has requests, nothing to do and nothing to wait for")
    waits = not self._overlap or any(row.waits for row in self._scheduler.running)
    while len(self._flight) > (1 if plan.work and not waits else 0):
      self._wait()
    deltas, self._early = self._early, []
    return deltas

  def load_weights(self, params: Params, version: str) -> None:
    """Goes on with other weights of the same shapes, under the same adapters. Requests keep the tokens that they have,
    whose keys and values are computed again; pages of the old weights are not found any more.

    Raises:
      ConfigError: they are of another model; the engine goes on with its own.
    """
    new = self._placed(params)
    if jax.tree.structure(new) != jax.tree.structure(self._params):
      raise ConfigError("these weights are of another model than this engine's")
    same = jax.tree.map(lambda old, own: old.shape == own.shape and old.dtype == own.dtype, self._params, new)
    if not all(jax.tree.leaves(same)):
      wrong = next(path for path, one in jax.tree_util.tree_leaves_with_path(same) if not one)
      raise ConfigError(f"these weights are of other shapes than this engine's, as {jax.tree_util.keystr(wrong)} is")
    while self._flight:
      self._wait()
    self._params, self.version = new, version
    self._encoded.clear()
    self._scheduler.restart()

  def score(
    self, texts: Sequence[Sequence[int]], adapter: str | Sequence[str | None] | None = None
  ) -> list[Float32[np.ndarray, " T-1"]]:
    """Of each text's tokens from the second on the log-probability, in nats, given those before it. Other requests go
    on meanwhile; the next `step` says what they gained.

    Args:
      adapter: of all texts, or of each.

    Raises:
      ConfigError: as `submit`; nothing is scored then.
    """
    if self.config.architecture != "decoder":
      raise ConfigError("score is of decoders: an encoder_decoder's prompt has no probability")
    asked: dict[int, Sequence[int]] = {}
    found: dict[int, list[float]] = {}
    others: list[Delta] = []
    try:
      for text, name in zip(texts, one_each(adapter, len(texts))):
        request = Request(text, SamplingParams(prompt_logprobs=0), adapter=name)
        asked[self._submit(request, draws=False)] = text
      found = {number: [] for number in asked}
      while any(number in self._rows for number in asked):
        for delta in self.step():
          if delta.id not in asked:
            others.append(delta)
          for shown in delta.prompt_logprobs or () if delta.id in asked else ():
            values = found[delta.id]
            values.append(shown[int(asked[delta.id][len(values) + 1])])
    finally:
      for number in asked:  # that is left, after an error or an interruption
        self.abort(number)
      self._early = others + [delta for delta in self._early if delta.id not in asked]
    return [np.asarray(values, np.float32) for values in found.values()]

  def stats(self) -> dict[str, int]:
    """Counts of now and since the start; `prefix_*` in tokens, `pages_free` with those that hold shareable text."""
    s, guesses = self._scheduler, self._speculator
    return {
      "running": len(s.running),
      "waiting": len(s.waiting),
      "preemptions": s.preemptions,
      "prefix_queries": s.prefix_queries,
      "prefix_hits": s.prefix_hits,
      "pages_free": self._pages.available,
      "pages_total": self._pages.total,
      "draft_tokens": 0 if guesses is None else guesses.drafted,
      "accepted_tokens": 0 if guesses is None else guesses.accepted,
      "compilations": self._programs.compilations,
    }

  # ---------------------------------------------------------------- a step

  def _start(self, plan: Plan) -> None:
    """Sends a step to the device and does not wait for it."""
    for row in plan.admitted:
      self._state = self._programs.begin(self._state, row.slot, row.tokens, row.sampling, row.adapter)
      if self.config.architecture == "encoder_decoder" and not self._encoded_in(row.slot, row):
        self._state = self._programs.encode(self._params, self._state, row.slot, row.request.prompt)
        self._encoded[row.slot] = row.adapter, row.request.prompt
    step = arrange(plan, self.sizes, self._pages)
    batch = self._programs.batch(step.shape, step.rows, step.tables, step.drafts, step.allowed)
    start = time.perf_counter()
    if self._draft_params is not None:
      self._state = self._programs.draft(self._draft_params, self._state, batch, step.shape)
    self._state, drawn = self._programs.step(self._params, self._state, batch, step.shape)
    self._flight.append((step, drawn, start))

  def _undo(self, plan: Plan) -> None:
    """After an interruption: the step may not be computed, so what it would have written is not to be found, and what
    it would have drawn will not come. All rows compute their tokens again."""
    if self._flight and self._flight[-1][0].plan is plan:
      return  # it was sent
    for work in plan.work:
      work.row.pending -= work.draws
    self._scheduler.restart()
    if any(x.is_deleted() for x in jax.tree.leaves(self._state)):  # a program took it, and what it gave is lost
      self._state = self._programs.empty()
      self._encoded.clear()

  def _wait(self) -> None:
    """Waits for the oldest step that was sent and takes in what it has drawn. It loses nothing if it is interrupted."""
    jax.block_until_ready(self._flight[0][1].token)
    self._early += self._read(*self._flight.popleft())

  def _read(self, step: Arranged, drawn: Drawn, start: float) -> list[Delta]:
    """What a step that is done has drawn; of rows that have ended meanwhile it is left out."""
    deltas = []
    if self._speculator is not None:
      self._speculator.took(step.shape, time.perf_counter() - start)
    for one in gained(step, drawn, self.sizes.packed):
      row = one.work.row
      row.pending -= one.work.draws
      if row.finished:
        continue
      row.scored += len(one.scores or ())
      if one.work.draws:
        deltas.append(self._take(row, one))
      elif row.limit == row.begins and row.scored == row.begins:
        deltas.append(self._last(row, "length", prompt_logprobs=tuple(one.scores or ())))
      elif one.scores:
        deltas.append(Delta(row.id, prompt_logprobs=tuple(one.scores)))
    return deltas

  def _take(self, row: Row, one: Gained) -> Delta:
    """Gives a row its tokens, up to its end."""
    before, reason, stop, error = len(row.tokens), None, None, None
    self._scheduler.settle(one.work, len(one.tokens) - 1)
    row.steps += 1
    if self._speculator is not None:
      self._speculator.note(row, len(one.work.drafts), len(one.tokens) - 1)
    for token in one.tokens:
      if token < 0:
        why = "the model's logits are not finite" if token == NO_NUMBERS else "its settings leave none over"
        reason, error = "error", f"no token can be drawn at position {len(row.tokens)}: {why}"
      else:
        try:
          reason, stop = row.take(token)
        except ConfigError as refused:
          reason, error = "error", str(refused)
      if reason is not None:
        break
    tokens = tuple(row.tokens[before:])
    facts: dict[str, Any] = dict(
      token_ids=tokens,
      logprobs=None if one.logprobs is None else one.logprobs[: len(tokens)],
      prompt_logprobs=None if one.scores is None else tuple(one.scores),
    )
    if reason is not None:
      return self._last(row, reason, stop_reason=stop, error=error, **facts)
    if row.slot is not None:
      self._scheduler.know(row)
    return Delta(row.id, **facts)

  # ---------------------------------------------------------------- requests and weights

  def _submit(self, request: Request, draws: bool) -> int:
    c, s, longest = self.config, request.sampling, self.sizes.max_model_len
    number = self._adapters.number(request.adapter)
    for name, value in (("logprobs", s.logprobs), ("prompt_logprobs", s.prompt_logprobs)):
      if value is not None and value > self.sizes.top:
        raise ConfigError(f"{name} is {value}; this engine gives up to {self.sizes.top} (max_logprobs)")
    if s.num_beams > 1:
      raise ConfigError("num_beams: the engine draws; beam search is a client of its own")
    decoder = c.architecture == "decoder"
    if not decoder and s.prompt_logprobs is not None:
      raise ConfigError("prompt_logprobs: an encoder_decoder's prompt has no probability")
    prompt = check_tokens(request.prompt, "the prompt", c.vocab_size, *self.sizes.longest_prompt(draws))
    first = prompt if decoder else [c.decoder_start_id]
    if self._lockstep and s.seed is None:
      s = dataclasses.replace(s, seed=agreement.from_first(secrets.randbits(64)))
      request = dataclasses.replace(request, sampling=s)
    limit = len(first) + (room_for(s, first, longest) if draws else 0)
    if request.generated:
      check_tokens(request.generated, "generated", c.vocab_size, limit - len(first) - 1, "of its completion")
    row = Row(next(self._numbers), dataclasses.replace(request, prompt=tuple(prompt)), first, limit)
    row.speculates, row.adapter = self._speculator is not None, number
    facts = row.begins, limit, tuple(row.ends), row.request.prompt
    row.sampling = self._programs.settings([row.settings], request.index, *facts)
    if row.left < 1:  # a single token to score
      self._early.append(Delta(row.id, finish_reason="length"))
      return row.id
    self._scheduler.add(row)
    self._rows[row.id] = row
    return row.id

  def _last(self, row: Row, reason: FinishReason, **facts) -> Delta:
    """Ends a row; after an error nobody may read what it has computed."""
    self._scheduler.finish(row, spoiled=reason == "error")
    del self._rows[row.id]
    if self._speculator is not None:
      self._speculator.forget(row)
    return Delta(row.id, finish_reason=reason, metrics=row.metrics(), cached_tokens=row.cached or 0, **facts)

  def _encoded_in(self, slot: int, row: Row) -> bool:
    return self._encoded.get(slot) == (row.adapter, row.request.prompt)

  def _facts(self, row: Row) -> tuple:
    source = row.request.prompt if self.config.architecture == "encoder_decoder" else ()
    switch = self.config.rope_switch
    stretched = switch is not None and row.known > switch
    # Keys of longer texts hang on their length, or (LongRoPE) on that they are longer.
    length = row.known if stretched and self._reread_beyond is None else int(stretched)
    return self.version, row.request.salt, row.adapter, source, length

  def _afforded(self, sizes: Sizes, place: jax.Device | Mesh, pages: Pages) -> dict[str, int]:
    """As many pages as there is memory for beside the weights."""
    device = place if isinstance(place, jax.Device) else place.local_devices[0]
    each = page_bytes(self.config, sizes.page_size, sizes.kv_dtype, self.compute.target)
    free = free_bytes(device)
    if self._lockstep:
      free = min(agreement.gather(free))
    return affordable(sizes.pages, pages.least(sizes.max_model_len), each, free)

  def _placed(self, params: Params, draft: DraftModel | None = None) -> Params:
    """The weights, or those of a draft model, as they compute: each layer apart, in their dtype, on the devices."""
    config, compute = (self.config, self.compute) if draft is None else (draft.config, draft.compute)
    params = params if self._mesh is not None else jax.device_put(params)  # arrays stay on the device where they are
    params = self._split(cast(unstack_layers(params), compute.dtype), config, compute)
    if draft is not None or not self._adapters:
      return params
    return self._split(self._adapters.over(params, self._mesh), config, compute)

  def _split(self, params: Params, config: ModelConfig, compute: Compute) -> Params:
    """The weights over the mesh, if there is one."""
    if self._mesh is None:
      return params
    wanted = described(params, declare(config, compute)[2], self._mesh, self._rules)
    return jax.tree.map(lambda x, want: _resplit(x, want.sharding), params, wanted)


def _resplit(x: jax.Array, sharding: NamedSharding) -> jax.Array:
  """An array split like this; on the devices where it is already also between processes."""
  if getattr(x, "sharding", None) and x.sharding.device_set == sharding.device_set:
    same = x.sharding.is_equivalent_to(sharding, x.ndim)
    return x if same else jax.jit(lambda x: x, out_shardings=sharding)(x)
  return jax.device_put(x, sharding)
