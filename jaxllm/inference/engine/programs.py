"""The engine's programs (`jaxllm.inference.engine.steps`) compiled, every shape once, and run."""

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from jaxllm.inference.engine.drafting import draft_function, draft_layers
from jaxllm.inference.engine.sizes import SMALLEST, Shape, Sizes, buckets
from jaxllm.inference.engine.speculation import DraftModel
from jaxllm.inference.engine.steps import Batch, Drawn, State, begin, encode_function, step_function
from jaxllm.inference.logits import EVERYTHING, words_for
from jaxllm.inference.params import SamplingParams
from jaxllm.inference.sampling import SamplingRows, sampling_rows
from jaxllm.models.build import Params, declare
from jaxllm.models.caches import Encoded, init_paged_cache
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.parallel.config import AxisRules
from jaxllm.parallel.sharding import activation_sharding, constrain, replicated

log = logging.getLogger("jaxllm")

MOST_JITTED = 256
_JITTED: collections.OrderedDict[tuple, Any] = collections.OrderedDict()  # the least recently used first


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
    draft: DraftModel | None = None,
    adapters: bool = False,
  ):
    self.config, self.compute, self.sizes = config, compute, sizes
    self.compilations, self.ready = 0, False
    self._mesh = place if isinstance(place, Mesh) else None
    self._rules = dataclasses.replace(rules, batch=(), seq=())  # a step's tokens are whole
    graph = declare(config, compute)[0]
    self._steps = {shape: step_function(graph, sizes, shape) for shape in sizes.shapes()}
    self._encode = encode_function(graph, compute.dtype)
    small = None if draft is None else (draft.config, draft.compute)
    self._adapters = adapters
    self._own = repr((config, compute, sizes, self._rules, options, small, adapters)), place
    self._draft_model, self._drafts = draft, {}
    if draft is not None:
      of = declare(draft.config, draft.compute)[0]
      self._drafts = {shape: draft_function(of, sizes, shape, config.vocab_size) for shape in self._steps}
    self._options = None if options is None else dict(options)  # of the compiler
    self._compiled: dict[tuple, Any] = {}
    self._whole = replicated(place) if isinstance(place, Mesh) else place
    self._all_allowed: dict[Shape, Any] = {}

  def empty(self) -> State:
    """The state of an engine without requests."""
    with jax.default_device(None if self._mesh else self._whole):
      return self._make_state()()

  def described(self, platform: str) -> State:
    """The ShapeDtypeStructs of `empty`, of devices that need not be here."""
    traced = self._make_state().trace()
    split = traced.lower(lowering_platforms=(platform,)).compile().output_shardings
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), traced.out_info, split)

  def _make_state(self):
    def make():
      c, s = self.config, self.sizes
      pages = {kind: count + 1 for kind, count in s.pages.items()}  # and the one that is nobody's
      cache = init_paged_cache(
        c, 1, s.max_model_len, pages=pages, page_size=s.page_size, dtype=s.kv_dtype, target=self.compute.target
      )
      encoded = None
      if c.architecture == "encoder_decoder":
        shape = s.slots, s.max_source_len, c.num_kv_heads, c.head_dim
        layers = tuple((jnp.zeros(shape, self.compute.dtype),) * 2 for _ in range(c.num_layers))
        encoded = Encoded(None, jnp.zeros(shape[:2], jnp.int32), layers)
      sampling = jax.tree.map(jnp.asarray, self.settings([SamplingParams(temperature=0, seed=0)] * s.slots))
      small = self._draft_model
      drafts = () if small is None else draft_layers(small.config, c, s, small.compute)
      # Whatever the pages are, this is on all devices of a mesh, and so all that the program makes.
      tokens = constrain(jnp.zeros((s.slots, s.max_model_len), jnp.int32), None, None)
      return State(cache.layers, drafts, tokens, sampling, encoded, tokens[:, 0] if self._adapters else None)

    # Over several devices its parts lie as they are constrained to.
    alone = self._mesh is not None and self._mesh.size == 1
    return jax.jit(self._on_mesh(make), **({"out_shardings": self._whole} if alone else {}))

  def settings(
    self,
    settings: Sequence[SamplingParams],
    index: int = 0,
    start: int = 0,
    limit: int = 0,
    ends: Sequence[int] = (),
    source: Sequence[int] = (),
  ) -> SamplingRows:
    """Settings of rows as a state has them; `start` and `limit` count tokens, `source` is a prompt; see `logit_rules`.

    Raises:
      ConfigError: more biased tokens or sequences than the engine has room for.
    """
    n = len(settings)
    facts = dict(begins=[start] * n, limits=[limit] * n, ends=[ends] * n, sources=[source] * n)
    return sampling_rows(
      settings, [index] * n, vocab_size=self.config.vocab_size, sequences=self.sizes.sequences, **facts
    )

  def put(self, tree: Any) -> Any:
    """Arrays of the host where all devices see them."""
    return jax.device_put(tree, self._whole)

  def batch(self, shape: Shape, rows, tables, drafts, allowed) -> Batch:
    """A step's arguments on the devices; `allowed` is None where everything is."""
    if allowed is None and shape not in self._all_allowed:
      words = words_for(self.config.vocab_size)
      self._all_allowed[shape] = self.put(np.full((shape.rows, shape.drafts + 1, words), EVERYTHING))
    sent = self.put(rows), self.put(tables), self.put(drafts)
    return Batch(*sent, self._all_allowed[shape] if allowed is None else self.put(allowed))

  def step(self, params: Params, state: State, batch: Batch, shape: Shape) -> tuple[State, Drawn]:
    """Computes the batch's tokens and draws, see `step_function`."""
    return self._program(("step", shape), self._steps[shape], (params, state, batch))

  def draft(self, params: Params, state: State, batch: Batch, shape: Shape) -> State:
    """The draft model reads the batch and guesses, see `draft_function`; before the step itself."""
    return self._program(("draft", shape), self._drafts[shape], (params, state, batch))

  def begin(self, state: State, slot: int, tokens: Sequence[int], sampling: SamplingRows, adapter: int = 0) -> State:
    """A row with these tokens, none of them computed, settings and the adapter with this number takes a slot."""
    row = np.zeros(self.sizes.max_model_len, np.int32)
    row[: len(tokens)] = tokens
    number = np.int32(adapter) if self._adapters else None
    return self._program(("begin",), begin, (state, *self.put((np.int32(slot), row, sampling, number))))

  def encode(self, params: Params, state: State, slot: int, source: Sequence[int]) -> State:
    """The encoder reads a row's text; the state keeps every layer's keys and values of it."""
    length = next(n for n in self._source_lengths() if n >= len(source))
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(source)] = source
    arguments = params, state, *self.put((np.int32(slot), tokens, np.int32(len(source))))
    return self._program(("encode", length), self._encode, arguments)

  def warm_up(self, params: Params, state: State, draft_params: Params | None = None) -> None:
    """Compiles all programs that are missing, and says how long it took; a compilation after that is a fault of ours,
    which is logged and counted."""
    start = time.perf_counter()
    lowered = {key: traced.lower() for key, traced in self.traced(params, state, draft_params)}
    with ThreadPoolExecutor() as pool:
      self._compiled |= dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values())))
    self.compilations += len(lowered)
    self.ready = True
    log.info("engine: %d programs ready in %.1f s", len(lowered), time.perf_counter() - start)

  def traced(
    self, params: Params, state: State, draft_params: Params | None = None
  ) -> Iterator[tuple[tuple, jax.stages.Traced]]:
    """Every program that is not compiled yet, by its key; the arguments may be ShapeDtypeStructs."""
    for key, function, arguments in self._all(params, state, draft_params):
      if key not in self._compiled:
        yield key, self._jitted(key, function, arguments).trace(*arguments)

  def _all(self, params, state, draft_params) -> Iterator[tuple[tuple, Callable, tuple]]:
    whole = self._whole if isinstance(self._whole, NamedSharding) else SingleDeviceSharding(self._whole)

    def like(shape, dtype=np.int32):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    for shape, step in self._steps.items():
      tables = dict.fromkeys(self.sizes.pages, like((shape.rows, self.sizes.max_pages)))
      words = like((shape.rows, shape.drafts + 1, words_for(self.config.vocab_size)), np.uint32)
      batch = Batch(like((6, shape.rows)), tables, like((shape.rows, shape.drafts)), words)
      yield ("step", shape), step, (params, state, batch)
      if self._drafts:
        yield ("draft", shape), self._drafts[shape], (draft_params, state, batch)
    settings = self.settings([SamplingParams(temperature=0, seed=0)])
    settings = jax.tree.map(lambda x: like(x.shape, x.dtype), settings)
    number = like(()) if self._adapters else None
    yield ("begin",), begin, (state, like(()), like((self.sizes.max_model_len,)), settings, number)
    for length in self._source_lengths():
      yield ("encode", length), self._encode, (params, state, like(()), like((1, length)), like(()))

  def _source_lengths(self) -> tuple[int, ...]:
    if self.config.architecture != "encoder_decoder":
      return ()
    return buckets(SMALLEST, self.sizes.max_source_len)

  def _program(self, key, function, arguments):
    if key not in self._compiled:
      if self.ready:
        log.warning("engine: a program of shape %s was not compiled at the start", key)
      self._compiled[key] = self._jitted(key, function, arguments)
      self.compilations += 1
    return self._compiled[key](*arguments)

  def _jitted(self, key, function, arguments):
    """Engines of one model and of the same sizes share it, and so what is compiled."""
    key = (*self._own, key)
    if key not in _JITTED:
      state = next(one for one in arguments if isinstance(one, State))
      stays = jax.tree.map(lambda x: x.sharding, state)
      read = None if self._mesh is None else self._whole  # every process reads what is drawn
      out = (stays, read) if function in self._steps.values() else stays
      donated = next(i for i, one in enumerate(arguments) if one is state)
      how = dict(donate_argnums=donated, out_shardings=out, compiler_options=self._options)
      _JITTED[key] = jax.jit(self._on_mesh(function), **how)
      while len(_JITTED) > MOST_JITTED:
        _JITTED.popitem(last=False)
    _JITTED.move_to_end(key)
    return _JITTED[key]

  def _on_mesh(self, function):
    if self._mesh is None:
      return function

    def run(*arguments):
      with activation_sharding(self._mesh, self._rules):
        return function(*arguments)

    return run
