"""Beam search: of each prompt the `num_beams` likeliest beginnings are continued, all at once.

The rules, and so the results, are those of transformers' `generate(num_beams=k)`: a completion's score is its
log-probability / length ** length_penalty; one that ends among a step's k best continuations is kept, and the
search of a prompt is over when it has k completions and, depending on `early_stopping`, no better one is
expected. The model computes on the device, the book-keeping happens on the host.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.base.errors import ConfigError
from jaxllm.inference.completions import Completion, Delta
from jaxllm.inference.logits import LogitRules, logit_rules
from jaxllm.inference.params import SamplingParams, with_word_ids
from jaxllm.inference.prompts import Prompts, batch_prompts, bucket, read_prompts, room_for
from jaxllm.inference.text import Decodes, TextStream
from jaxllm.models.build import Params
from jaxllm.models.config import ModelConfig


@functools.lru_cache(maxsize=8)
def programs(graph: nnx.GraphDef) -> tuple[Callable, Callable]:
  """The two jitted functions of a search; both return the cache and the `keep` best continuations of each
  prompt: their scores [B, keep], and beam * V + token.

  start(params, prompts, rules, history, cache_length, beams, keep): reads the prompts; the cache has B * beams rows.
  step(params, cache, beam, scores, rules, history, keep): takes the cache as a donation. Each prompt's new beams are
    its old ones numbered `beam` [B, k], continued by a token, with log-probabilities `scores` [B, k].

  `history` [B * k, T] are the tokens of each beam, the new one included. The rules change log-probabilities,
  as they do in transformers.
  """

  def best(logits, scores, rules, positions, history, keep):
    prompts, beams = scores.shape
    logprobs = rules.apply(jax.nn.log_softmax(logits), positions, history)
    totals = scores[:, :, None] + logprobs.reshape(prompts, beams, -1)
    return jax.lax.top_k(totals.reshape(prompts, -1), keep)

  @functools.partial(jax.jit, static_argnames=("cache_length", "beams", "keep"))
  def start(params, prompts: Prompts, rules: LogitRules, history, cache_length: int, beams: int, keep: int):
    logits, cache = read_prompts(nnx.merge(graph, params), prompts, cache_length)
    copies = jnp.repeat(jnp.arange(len(logits)), beams)
    logits, cache = logits[copies], cache.rows(copies)
    scores = jnp.where(jnp.arange(beams) == 0, 0.0, -1e9)  # the beams are copies: one goes on
    scores = jnp.broadcast_to(scores, (len(prompts.lengths), beams))
    return cache, best(logits, scores, rules, cache.length, history, keep)

  @functools.partial(jax.jit, static_argnames="keep", donate_argnames="cache")
  def step(params, cache, beam, scores, rules: LogitRules, history, keep: int):
    rows = (beam + beam.shape[1] * jnp.arange(len(beam))[:, None]).reshape(-1)
    encoded = cache.encoded  # a prompt's beams share what they see of the encoder
    cache = dataclasses.replace(dataclasses.replace(cache, encoded=None).rows(rows), encoded=encoded)
    model = nnx.merge(graph, params)
    token = jnp.take_along_axis(history, cache.length[:, None], axis=1)
    x, cache = model.hidden(token, cache=cache)
    return cache, best(model.logits(x)[:, 0], scores, rules, cache.length, history, keep)

  return start, step


def search(
  graph: nnx.GraphDef,
  params: Params,
  config: ModelConfig,
  prompts: Sequence[Sequence[int]],
  sampling: Sequence[SamplingParams],
  tokenizer: Decodes | None,
  eos_ids: Sequence[int],
) -> Iterator[Delta]:
  """The `n` best completions of every prompt, best first, once all are found; see `generate_tokens`.

  Raises:
    ConfigError: the prompts' `num_beams` differ.
  """
  beams = sampling[0].num_beams
  if any(settings.num_beams != beams for settings in sampling):
    raise ConfigError("prompts of one batch need the same num_beams; generate them apart")
  searches = [_Search(prompt, settings, config, tokenizer, eos_ids) for prompt, settings in zip(prompts, sampling)]
  # Even if the best continuations are all ends, so many hold num_beams others.
  keep = beams * max(2, 1 + max(len(one.ends) for one in searches))
  start, step = programs(graph)
  length = bucket(max(one.begins + one.limit for one in searches), config)
  each = [one for one in searches for _ in range(beams)]
  rules = logit_rules(
    [one.settings for one in each],
    begins=[one.begins for one in each],
    limits=[one.begins + one.limit for one in each],
    ends=[one.ends for one in each],
    vocab_size=config.vocab_size,
  )
  batch = batch_prompts(prompts, config)
  history = np.zeros((len(each), length), np.int32)
  history[:, : batch.tokens.shape[1]] = np.repeat(batch.tokens, beams, axis=0)
  cache, found = start(params, batch, rules, history, cache_length=length, beams=beams, keep=keep)
  while True:
    for one, scores, indices in zip(searches, *map(np.asarray, found)):
      one.take(scores, *np.divmod(indices, config.vocab_size))
    if all(one.done for one in searches):
      break
    beam, scores = (np.stack(rows) for rows in zip(*(one.running for one in searches)))
    for one, rows in zip(searches, np.split(history, len(searches))):
      one.write(rows)
    cache, found = step(params, cache, beam, scores, rules, history, keep=keep)
  for i, one in enumerate(searches):
    context = prompts[i] if config.architecture == "decoder" else ()
    for n, completion in enumerate(one.completions(i, tokenizer, context)):
      yield Delta(i, n, completion.text, completion.token_ids, completion)


class _Search:
  """One prompt's beams."""

  def __init__(self, prompt, settings: SamplingParams, config: ModelConfig, tokenizer: Decodes | None, eos_ids):
    settings = with_word_ids(settings, tokenizer)
    self.settings, self.prompt_tokens = settings, len(prompt)
    self.begins = len(prompt) if config.architecture == "decoder" else 1
    self.limit = room_for(settings, range(self.begins), config.max_seq_len)
    self.eos = frozenset(() if settings.ignore_eos else eos_ids)
    self.ends = self.eos | set(settings.stop_token_ids)
    self.done = False
    self._tokens: list[list[int]] = [[]] * settings.num_beams  # of each running beam
    self._finished: list[tuple[float, list[int]]] = []  # scores and tokens, best first
    self.running: tuple[np.ndarray, np.ndarray]  # of each beam: its parent and score

  def take(self, scores, parents, tokens):
    """Chooses the next beams from the best continuations, best first; sets `done` when there is no need to."""
    if self.done:
      return
    s, length = self.settings, len(self._tokens[0]) + 1
    last = length >= self.limit
    ended = np.isin(tokens, list(self.ends)) | last
    new = [
      (float(scores[i]) / length**s.length_penalty, [*self._tokens[parents[i]], int(tokens[i])])
      for i in np.flatnonzero(ended[: s.num_beams])
    ]
    self._finished = sorted(self._finished + new, key=lambda pair: -pair[0])[: s.num_beams]
    chosen = np.flatnonzero(~ended)[: s.num_beams]
    if last:
      self.done = True
      return
    self.running = parents[chosen], scores[chosen]
    self._tokens = [[*self._tokens[parent], int(token)] for parent, token in zip(parents[chosen], tokens[chosen])]
    if len(self._finished) == s.num_beams:
      longest = self.limit if s.early_stopping == "never" and s.length_penalty > 0 else length
      hope = float(scores[chosen[0]]) / longest**s.length_penalty
      self.done = s.early_stopping is True or hope <= self._finished[-1][0]

  def write(self, rows: np.ndarray) -> None:
    """Writes each beam's tokens into its row [k, T], behind the prompt."""
    rows[:, self.begins : self.begins + len(self._tokens[0])] = self._tokens

  def completions(self, prompt_index: int, tokenizer: Decodes | None, context: Sequence[int]) -> Iterator[Completion]:
    for index, (score, tokens) in enumerate(self._finished[: self.settings.n]):
      end = tokens[-1] if tokens[-1] in self.ends else None
      text = ""
      if tokenizer is not None:
        stream = TextStream(tokenizer, context)
        text = "".join(map(stream.push, tokens if end is None else tokens[:-1])) + stream.finish()
      yield Completion(
        prompt_index=prompt_index,
        index=index,
        text=text,
        token_ids=tuple(tokens),
        finish_reason="length" if end is None else "stop",
        stop_reason=None if end in self.eos else end,
        prompt_tokens=self.prompt_tokens,
        score=score,
      )
