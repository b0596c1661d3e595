"""A model's own engine: made for what is asked of it, and kept for the next time."""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from jaxllm.base.errors import ConfigError, DataError
from jaxllm.inference import beam
from jaxllm.inference.completions import Completion, Delta
from jaxllm.inference.engine import Engine
from jaxllm.inference.logits import biased_runs
from jaxllm.inference.params import SamplingParams, with_word_ids
from jaxllm.inference.prompts import bucket, check_prompt, longest_text, room_for, token_ids, with_an_end
from jaxllm.inference.requests import Requests
from jaxllm.kernels import backends
from jaxllm.models.build import Params
from jaxllm.models.config import Compute, ModelConfig

MOST_ROWS = 64  # completions that are computed at once; others wait
PAGE = 16  # tokens
SOURCE = 128  # tokens that an encoder has room for at least: short prompts of all lengths share an engine


class Generator:
  """Completes prompts with a model; see `jaxllm.inference.model.Model.generate`.

  Args:
    params: best as `jaxllm.models.build.unstack_layers` makes them; stacked ones are unstacked anew for each engine.
    tokenizer: for `text`, and needed for stop strings.
  """

  def __init__(
    self,
    graph: nnx.GraphDef,
    params: Params,
    config: ModelConfig,
    compute: Compute = Compute(),
    tokenizer: Any = None,
  ):
    self._graph, self._params, self._config, self._compute = graph, params, config, compute
    self._tokenizer = tokenizer
    self._served: _Served | None = None

  def complete(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
    eos_ids: Sequence[int] = (),
  ) -> list[Completion]:
    """The `n` completions of the first prompt, then of the second, …; see `stream`."""
    done = [delta.completion for delta in self.stream(prompts, sampling, eos_ids) if delta.completion is not None]
    return sorted(done, key=lambda completion: (completion.prompt_index, completion.index))

  def stream(
    self,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
    eos_ids: Sequence[int] = (),
  ) -> Iterator[Delta]:
    """What each completion gains, as it happens.

    An encoder_decoder reads a prompt with its encoder and begins with `config.decoder_start_id`.

    Args:
      prompts: token ids of each prompt, at least one, of any length below the model's limit, if it has one.
      sampling: one for all prompts, or one for each.
      eos_ids: tokens that end a completion unless `ignore_eos`.

    Raises:
      ConfigError: an empty prompt, one that is too long, or a token that the model does not have.
      DataError: of the iterator: no token can be drawn somewhere.
    """
    config = self._config
    each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(each) != len(prompts):
      raise ConfigError(f"{len(each)} sampling settings for {len(prompts)} prompts; give one, or one for each")
    names = [f"prompt {number + 1}" if len(prompts) > 1 else "the prompt" for number in range(len(prompts))]
    prompts = [token_ids(prompt, name) for prompt, name in zip(prompts, names)]
    for name, prompt in zip(names, prompts):
      check_prompt(prompt, name, config)
    if config.architecture == "encoder" or config.head != "lm":
      raise ConfigError("this model has no head that writes text; it can encode, embed or classify texts")
    each = [with_an_end(settings, config) for settings in each]
    if any(settings.prompt_logprobs is not None for settings in each):
      raise ConfigError("prompt_logprobs are not among what generate gives; `LLM.generate` gives them")
    searched = [i for i, settings in enumerate(each) if settings.num_beams > 1]
    drawn = [i for i, settings in enumerate(each) if settings.num_beams == 1]
    found: list[Iterator[Delta]] = []
    if drawn:
      found.append(self._draw({i: (prompts[i], each[i]) for i in drawn}, eos_ids))
    if searched:
      found.append(self._search({i: (prompts[i], each[i]) for i in searched}, eos_ids))
    return found[0] if len(found) == 1 else _one_after_the_other(found)

  def _draw(self, asked: dict[int, tuple[list[int], SamplingParams]], eos_ids: Sequence[int]) -> Iterator[Delta]:
    served = self._for(*zip(*asked.values()))
    numbers: dict[int, int] = {}
    try:
      for i, (prompt, settings) in asked.items():
        numbers[served.requests.submit(prompt, settings, eos_ids=eos_ids)] = i
    except BaseException:
      served.drop(numbers)
      raise
    return served.deltas(numbers)

  def _search(self, asked: dict[int, tuple[list[int], SamplingParams]], eos_ids: Sequence[int]) -> Iterator[Delta]:
    """Beam search, with an engine of pages so small that a beam computes nothing which another has computed."""
    prompts, each = zip(*asked.values())
    sizes = self._sizes(prompts, each) | {
      "max_num_seqs": min(MOST_ROWS, _power(sum(one.num_beams for one in each))),
      "max_logprobs": max(beam.continuations(one, eos_ids) for one in each),
    }
    page = 1 if backends.TARGETS[self._compute.target] == "cpu" else PAGE
    engine = self._engine(**sizes, page_size=page, processed_logprobs=True, overlap=False)
    numbers = list(asked)
    for done in beam.search(engine, prompts, each, self._tokenizer, eos_ids):
      i = numbers[done.prompt_index]
      yield Delta(i, done.index, done.text, done.token_ids, _renumbered(done, i))

  def _for(self, prompts: Sequence[Sequence[int]], each: Sequence[SamplingParams]) -> "_Served":
    """An engine with room for this, the one that there is if it has."""
    asked, served = self._sizes(prompts, each), self._served
    if served is None or any(served.sizes[name] < value for name, value in asked.items()):
      sizes = {name: value if served is None else max(value, served.sizes[name]) for name, value in asked.items()}
      page = min(PAGE, sizes["max_model_len"])
      self._served = served = _Served(sizes, Requests(self._engine(**sizes, page_size=page), self._tokenizer))
    return served

  def _sizes(self, prompts: Sequence[Sequence[int]], each: Sequence[SamplingParams]) -> dict[str, int]:
    """Of an engine with room for this."""
    c = self._config
    decoder = c.architecture == "decoder"
    firsts = [prompt if decoder else [0] for prompt in prompts]
    longest = max(len(first) + room_for(one, first, longest_text(c)) for first, one in zip(firsts, each))
    each = [with_word_ids(one, self._tokenizer) if self._tokenizer is not None else one for one in each]
    runs = [biased_runs(one, prompt) for one, prompt in zip(each, prompts)]
    return {
      "max_num_seqs": min(MOST_ROWS, _power(sum(one.draws for one in each))),
      "max_model_len": bucket(longest, c),
      **({} if decoder else {"max_source_len": bucket(max(min(SOURCE, c.max_seq_len), *map(len, prompts)), c)}),
      "max_logprobs": min(_power(max(one.logprobs or 0 for one in each)), c.vocab_size),
      "biases": _power(max(map(len, runs))),
      "bias_tokens": _power(max((len(ids) for row in runs for ids, _ in row), default=1)),
    }

  def _engine(self, *, biases: int, bias_tokens: int, **settings) -> Engine:
    return Engine(
      self._config,
      self._params,
      compute=self._compute,
      mesh=_mesh_of(self._params),
      max_biases=(biases, bias_tokens),
      **settings,
    )


class _Served:
  """An engine that several streams may share: whoever waits for his deltas makes the steps."""

  def __init__(self, sizes: dict[str, int], requests: Requests):
    self.sizes, self.requests = sizes, requests
    self._waiting: dict[int, collections.deque[Delta]] = {}

  def deltas(self, numbers: dict[int, int]) -> Iterator[Delta]:
    """The deltas of these requests, by which number each is to be called; ends them when nobody listens any more."""
    found = self._deltas(numbers)
    next(found)  # it has begun, and so will end even if nobody ever reads it
    return found

  def _deltas(self, numbers: dict[int, int]) -> Iterator[Any]:
    mine: collections.deque[Delta] = collections.deque()
    self._waiting |= dict.fromkeys(numbers, mine)
    left = {number: self.requests.completions(number) for number in numbers}
    try:
      yield
      while any(left.values()):
        if not mine:
          self._step()
          continue
        delta = mine.popleft()
        index, done = numbers[delta.prompt_index], delta.completion
        if done is not None:
          if done.finish_reason == "error":
            raise DataError(f"prompt {index + 1}: {done.error}" if len(numbers) > 1 else str(done.error))
          done = _renumbered(done, index)
        yield Delta(index, delta.index, delta.text, delta.token_ids, done)
        left[delta.prompt_index] -= done is not None
    finally:
      self.drop(numbers)

  def drop(self, numbers: dict[int, int]) -> None:
    """Ends these requests, and forgets them."""
    for number in numbers:
      self.requests.forget(number)
      self._waiting.pop(number, None)

  def _step(self) -> None:
    for delta in self.requests.step():
      if delta.prompt_index in self._waiting:
        self._waiting[delta.prompt_index].append(delta)


def _one_after_the_other(parts: Sequence[Iterator[Delta]]) -> Iterator[Delta]:
  """As `itertools.chain`, but it can be closed; its parts end when nobody has them any more."""
  for part in parts:
    yield from part


def _renumbered(done: Completion, index: int) -> Completion:
  return Completion(**{**vars(done), "prompt_index": index})


def _power(value: int) -> int:
  return 1 << max(value - 1, 0).bit_length()


def _mesh_of(params: Params):
  """The mesh over which the weights lie, if they lie on several devices."""
  sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
  return sharding.mesh if isinstance(sharding, NamedSharding) and len(sharding.device_set) > 1 else None
