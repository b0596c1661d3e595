"""What generation gives back: whole completions, their parts as they come, and answers in vLLM's shape."""

import dataclasses
from collections.abc import Sequence
from typing import Literal


class Logprob(float):
  """A log-probability in nats, at temperature 1 and before any setting changed the logits."""

  rank: int  # 1: the most likely token
  decoded_token: str | None  # its text; None without a tokenizer

  def __new__(cls, logprob: float, rank: int, decoded_token: str | None = None) -> "Logprob":
    self = super().__new__(cls, logprob)
    self.rank, self.decoded_token = rank, decoded_token
    return self

  def __getnewargs__(self):
    return float(self), self.rank, self.decoded_token

  @property
  def logprob(self) -> float:
    """The number alone."""
    return float(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOutput:
  """One completion, finished or on its way. `token_ids` includes the token that ended it, `text` does not."""

  index: int  # which of its prompt's `n` completions
  text: str  # "" without a tokenizer
  token_ids: tuple[int, ...]
  cumulative_logprob: float | None = None  # of all its tokens, where log-probabilities were asked for
  # For each token: itself and the most likely tokens.
  logprobs: tuple[dict[int, Logprob], ...] | None = None
  finish_reason: Literal["stop", "length", "abort", "error"] | None = None  # None: not finished
  stop_reason: int | str | None = None  # the token id or string that stopped it; None for the end-of-text token
  error: str | None = None  # of the finish_reason "error"

  def finished(self) -> bool:
    """Whether it is whole."""
    return self.finish_reason is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion(CompletionOutput):
  """One finished completion of one of several prompts."""

  prompt_index: int  # which prompt it continues
  prompt_tokens: int
  score: float | None = None  # beam search: log-probability / length ** length_penalty

  def output(self) -> CompletionOutput:
    """The completion alone, whichever prompt it continues."""
    return CompletionOutput(**{field.name: getattr(self, field.name) for field in dataclasses.fields(CompletionOutput)})


@dataclasses.dataclass(frozen=True)
class Delta:
  """What one row gained: tokens, and the text that they completed."""

  prompt_index: int
  index: int
  text: str
  token_ids: tuple[int, ...]
  completion: Completion | None = None  # with the row's last delta


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestMetrics:
  """When things happened to a request, in seconds of `time.monotonic`; None: not yet."""

  arrival_time: float
  first_scheduled_time: float | None = None
  first_token_time: float | None = None
  finished_time: float | None = None
  target_steps: int = 0  # decode steps of the model; fewer than tokens where drafts were accepted


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
  """The answer to one prompt, or as much of it as there is."""

  request_id: str
  prompt: str | None  # None where token ids were given
  prompt_token_ids: tuple[int, ...]
  outputs: tuple[CompletionOutput, ...]
  finished: bool
  # For each token of the prompt: itself and the most likely ones; None for the first one, which nothing precedes.
  prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
  metrics: RequestMetrics | None = None
  num_cached_tokens: int = 0  # tokens of the prompt that the prefix cache had

  @property
  def error(self) -> str | None:
    """What was wrong with the request, if anything was."""
    return next((one.error for one in self.outputs if one.error is not None), None)


@dataclasses.dataclass(frozen=True)
class EmbeddingOutput:
  """A text as a vector."""

  embedding: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingRequestOutput:
  """The vector of one text."""

  request_id: str
  prompt_token_ids: tuple[int, ...]
  outputs: EmbeddingOutput
  finished: bool = True


def request_outputs(
  completions: Sequence[Completion], prompts: Sequence[str | None], prompt_token_ids: Sequence[Sequence[int]]
) -> list[RequestOutput]:
  """The finished answer to every prompt, its completions in the order of their index."""
  answers: list[list[Completion]] = [[] for _ in prompt_token_ids]
  for completion in sorted(completions, key=lambda one: one.index):
    answers[completion.prompt_index].append(completion)
  return [
    RequestOutput(
      request_id=str(number),
      prompt=prompt,
      prompt_token_ids=tuple(ids),
      outputs=tuple(one.output() for one in answer),
      finished=True,
    )
    for number, (prompt, ids, answer) in enumerate(zip(prompts, prompt_token_ids, answers, strict=True))
  ]
