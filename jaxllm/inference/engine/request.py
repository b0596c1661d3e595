"""What is asked of the engine, what it answers, and a request on its way: token ids only."""

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from jaxtyping import UInt32

from jaxllm.base.errors import ConfigError
from jaxllm.inference.completions import Logprob, RequestMetrics
from jaxllm.inference.engine.pages import Held, first_key, next_key
from jaxllm.inference.engine.steps import LogProbs
from jaxllm.inference.params import SamplingParams
from jaxllm.inference.prompts import token_ids
from jaxllm.inference.sampling import SamplingRows

FinishReason = Literal["stop", "length", "abort", "error"]


class Guides(Protocol):
  """What follows a completion and says which tokens may come next; see `jaxllm.inference.guided.Guide`."""

  allowed: UInt32[np.ndarray, " W"]
  finished: bool

  def take(self, token: int) -> None: ...

  def allowed_after(self, drafts: Sequence[int]) -> UInt32[np.ndarray, "K+1 W"]: ...


@dataclasses.dataclass(frozen=True)
class Request:
  """One completion of a prompt.

  An encoder_decoder reads the prompt with its encoder and begins with `config.decoder_start_id`. With
  `sampling.prompt_logprobs` the prompt is read anew even where its pages are found.
  """

  prompt: Sequence[int]
  # `n`, `best_of` and texts (`stop`, `bad_words`, `structured_outputs`) are for clients, which have a tokenizer.
  sampling: SamplingParams = SamplingParams()
  eos_ids: Sequence[int] = ()  # end the completion unless `sampling.ignore_eos`
  index: int = 0  # which completion of its prompt: what is drawn depends on the seed and on this
  priority: int = 0  # the lowest goes first, among equals the first come
  salt: str = ""  # pages are shared between requests of one salt only
  guide: Guides | None = None  # of this completion alone
  adapter: str | None = None  # one of the engine's; None: the model without any
  generated: Sequence[int] = ()  # tokens of the completion that there are already: it goes on behind them


@dataclasses.dataclass(frozen=True)
class Delta:
  """What a request gained, and with its last delta why it ended."""

  id: int
  token_ids: tuple[int, ...] = ()
  # With `sampling.logprobs`, for each token: log-probabilities at temperature 1 of itself and of the likeliest ones.
  logprobs: tuple[dict[int, Logprob], ...] | None = None
  prompt_logprobs: tuple[dict[int, Logprob], ...] | None = None  # of the tokens after the prompt's first, as they come
  finish_reason: FinishReason | None = None
  stop_reason: int | None = None  # the one of `stop_token_ids` that ended it
  error: str | None = None  # of the finish_reason "error"
  metrics: RequestMetrics | None = None  # with the last delta
  cached_tokens: int = 0  # of the prompt, found when the request was first admitted; with the last delta


class Row:
  """A request on its way: a row of the batch whenever it is scheduled.

  Of its `total` tokens the last `pending` ones have been drawn on the device and are not known here yet. The keys and
  values of the first `computed` ones are in its pages, or will be once the steps that were dispatched are done.
  """

  def __init__(self, number: int, request: Request, first_tokens: Sequence[int], limit: int):
    self.id, self.request = number, request
    self.settings = request.sampling
    if self.settings.seed is None:  # drawn again after a preemption, a token must be the same
      self.settings = dataclasses.replace(self.settings, seed=secrets.randbits(64))
    self.eos = frozenset(() if self.settings.ignore_eos else request.eos_ids)
    self.ends = self.eos | set(self.settings.stop_token_ids)
    self.tokens = [*first_tokens, *(int(token) for token in request.generated)]
    self.begins = len(first_tokens)  # tokens before the completion's first
    self.known = self.begins  # tokens of the text as it is read, `KVCache.known`
    self.limit = limit  # of tokens in all
    self.computed = self.pending = 0
    self.scored = 1  # tokens whose log-probability is known or needs none, from the first on
    self.slot: int | None = None  # its place on the device while it runs
    self.held: Held | None = None
    self.finished = False
    self.speculates = False  # whether drafts are asked for
    self.adapter = 0  # the engine's number of it
    self.drafts: tuple[int, ...] = ()  # guesses at its next tokens, for the next step
    self.keys: list[bytes] = []  # of the pages that its known tokens fill
    self.cached: int | None = None  # tokens found when it was first admitted
    self.sampling: SamplingRows  # its settings as the device takes them
    self.steps = 0  # in which tokens were drawn for it
    self._times: dict[str, float] = {"arrival_time": time.monotonic()}

  @property
  def order(self) -> tuple[int, int]:
    """Who goes first."""
    return self.request.priority, self.id

  @property
  def total(self) -> int:
    return len(self.tokens) + self.pending

  @property
  def draws(self) -> bool:
    """Whether another token may be drawn, as far as one knows without those that are pending."""
    return self.total < self.limit

  @property
  def waits(self) -> bool:
    """Whether its next step needs to know what the one before has drawn."""
    return self.speculates or self.request.guide is not None

  @property
  def scores(self) -> bool:
    """Whether it still wants log-probabilities of its prompt."""
    return self.settings.prompt_logprobs is not None and self.scored < self.begins

  @property
  def left(self) -> int:
    """Tokens to compute before the next one can be drawn; of a prompt that is only scored, all but the last."""
    if self.waits and self.pending:
      return 0
    goal = self.total if self.draws else self.begins - 1 if self.limit == self.begins else 0
    return max(0, goal - self.computed)

  def update_keys(self, page_size: int, *facts: str | int | Sequence[int]) -> None:
    """Keys for the pages that have become full; `facts` as in `pages.first_key`."""
    for start in range(len(self.keys) * page_size, len(self.tokens) - page_size + 1, page_size):
      before = self.keys[-1] if self.keys else first_key(*facts)
      self.keys.append(next_key(before, self.tokens[start : start + page_size]))

  def note(self, what: Literal["first_scheduled_time", "first_token_time"]) -> None:
    """That this happens now, if it had not before."""
    self._times.setdefault(what, time.monotonic())

  def metrics(self) -> RequestMetrics:
    """When things happened; it ends now."""
    return RequestMetrics(**self._times, finished_time=time.monotonic(), target_steps=self.steps)

  def take(self, token: int) -> tuple[FinishReason | None, int | None]:
    """Adds a drawn token; why it is the last, if it is.

    Raises:
      ConfigError: the guide cannot go on behind it.
    """
    self.note("first_token_time")
    self.tokens.append(token)
    if token in self.ends:
      return "stop", None if token in self.eos else token
    if self.request.guide is not None:
      self.request.guide.take(token)
      if self.request.guide.finished:
        return "stop", None
    return ("length" if len(self.tokens) >= self.limit else None), None


def probabilities(token: int, found: LogProbs, place: int | tuple[int, int], count: int) -> dict[int, Logprob]:
  """Log-probabilities by token: of this one, and of the `count` likeliest."""
  ids, values = found.top_ids[place][:count], found.top[place]
  top = {int(i): Logprob(float(p), rank) for rank, (i, p) in enumerate(zip(ids, values), 1)}
  return {token: Logprob(float(found.token[place]), int(found.rank[place]))} | top


def check_tokens(tokens: Sequence[int], what: str, vocab_size: int, longest: int, limit: str) -> list[int]:
  """The token ids as a list.

  Raises:
    ConfigError: there are none, more than `longest` (which `limit` names), or one that the model does not have.
  """
  ids = token_ids(tokens, what)
  if not ids:
    raise ConfigError(f"{what} is empty; a completion needs at least one token before it")
  if len(ids) > longest:
    raise ConfigError(f"{what} has {len(ids)} tokens, and there is room for {longest} ({limit}); shorten it")
  if min(ids) < 0 or max(ids) >= vocab_size:
    bad = next(token for token in ids if not 0 <= token < vocab_size)
    raise ConfigError(f"{what} holds token {bad}, but the model's vocabulary has {vocab_size} tokens")
  return ids
