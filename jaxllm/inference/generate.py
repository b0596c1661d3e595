"""Batched generation: one prefill of the prompts, then a decode step that is compiled once.

Rows are padded on the right, so that the token at position p of a row lies in slot p of its cache. What the
prefill writes after a row's last token is never seen: a query sees no later slot, and every slot is
overwritten before the row's length reaches it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.base.errors import ConfigError
from jaxllm.inference import beam
from jaxllm.inference.completions import Completion, Delta, Logprob
from jaxllm.inference.logits import EVERYTHING, words_for
from jaxllm.inference.params import SamplingParams
from jaxllm.inference.prompts import Prompts, batch_prompts, bucket, check_prompt, read_prompts
from jaxllm.inference.rows import Row
from jaxllm.inference.sampling import SamplingRows, sampling_rows
from jaxllm.inference.text import Decodes
from jaxllm.kernels import backends
from jaxllm.models.build import Params
from jaxllm.models.caches import KVCache
from jaxllm.models.config import ModelConfig

# Decode steps that one dispatch runs when nobody watches. On a 2-core CPU 8 are 15% faster than 1 for a
# 4M-parameter model, 8% for 10M, equal for 135M; up to 7 steps are wasted at the end.
STEPS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """What a decode step takes and returns: the cache, and the tokens of each row, of which the last is not in it."""

  cache: KVCache
  tokens: Int[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
  """The tokens of a step, and where they were asked for, log-probabilities of them and of the top ones."""

  token: Int[Array, " B"]
  logprob: Float[Array, " B"] | None
  rank: Int[Array, " B"] | None  # 1: the most likely one
  top_logprobs: Float[Array, "B top"] | None
  top_tokens: Int[Array, "B top"] | None

  def logprobs(self, step: int, row: int, top: int, tokenizer: Decodes | None) -> dict[int, Logprob]:
    """Those of one token, and of the `top` most likely ones."""
    assert self.logprob is not None and self.rank is not None
    found = {int(self.token[step, row]): (self.logprob[step, row], self.rank[step, row])}
    ranked = zip(self.top_tokens[step, row, :top], self.top_logprobs[step, row])
    found |= {int(token): (logprob, rank) for rank, (token, logprob) in enumerate(ranked, 1)}
    known = 0 if tokenizer is None else tokenizer.vocab_size
    text = lambda token: tokenizer.decode([token]) if token < known else None  # noqa: E731
    return {token: Logprob(float(logprob), int(rank), text(token)) for token, (logprob, rank) in found.items()}


@functools.lru_cache(maxsize=8)
def programs(graph: nnx.GraphDef) -> tuple[Callable, Callable]:
  """The two jitted functions of a model.

  prefill(params, prompts, rows, allowed, cache_length, top) -> (state, Drawn): reads prompts and draws the token
    after each.
  decode(params, state, limits [B], rows, allowed, steps, top) -> (state, Drawn with a leading axis of steps): takes
    the state as a donation. A row stays where it is once it has `limits` tokens,
    prompt included.

  `allowed` [B, W] are the tokens that may be drawn, packed, or None for all; `top` is None, or how many
  log-probabilities to return beside the drawn token's.
  """

  def draw(logits, positions, history, rows, allowed, top):
    token = rows.draw(logits, positions, history, allowed)
    if top is None:
      return Drawn(token, None, None, None, None)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)
    return Drawn(token, chosen[:, 0], (logprobs > chosen).sum(-1) + 1, *jax.lax.top_k(logprobs, top))

  @functools.partial(jax.jit, static_argnames=("cache_length", "top"))
  def prefill(params, prompts: Prompts, rows: SamplingRows, allowed, cache_length: int, top: int | None):
    logits, cache = read_prompts(nnx.merge(graph, params), prompts, cache_length)
    history = jnp.pad(prompts.tokens, ((0, 0), (0, max(cache_length - prompts.tokens.shape[1], 0))))
    drawn = draw(logits, prompts.lengths, history, rows, allowed, top)
    return DecodeState(cache, _put(history, prompts.lengths, drawn.token)), drawn

  @functools.partial(jax.jit, static_argnames=("steps", "top"), donate_argnames="state")
  def decode(params, state: DecodeState, limits, rows: SamplingRows, allowed, steps: int, top: int | None):
    model = nnx.merge(graph, params)

    def step(state, _):
      before = state.cache.length
      token = jnp.take_along_axis(state.tokens, before[:, None], axis=1)
      x, cache = model.hidden(token, cache=state.cache)
      drawn = draw(model.logits(x)[:, 0], before + 1, state.tokens, rows, allowed, top)
      goes_on = before + 1 < limits
      cache = cache.rewind(jnp.where(goes_on, before + 1, before))
      places = jnp.where(goes_on, before + 1, state.tokens.shape[1])  # a place behind the last one: nowhere
      return DecodeState(cache, _put(state.tokens, places, drawn.token)), drawn

    if steps == 1:
      state, drawn = step(state, None)
      return state, jax.tree.map(lambda x: x[None], drawn)
    return jax.lax.scan(step, state, length=steps)

  return prefill, decode


def _put(tokens: Int[Array, "B T"], places: Int[Array, " B"], new: Int[Array, " B"]) -> Int[Array, "B T"]:
  return tokens.at[jnp.arange(len(new)), places].set(new, mode="drop")


def generate_tokens(
  graph: nnx.GraphDef,
  params: Params,
  config: ModelConfig,
  prompts: Sequence[Sequence[int]],
  sampling: SamplingParams | Sequence[SamplingParams],
  *,
  tokenizer: Decodes | None = None,
  eos_ids: Sequence[int] = (),
) -> list[Completion]:
  """Completes every prompt; returns the `n` completions of the first prompt, then of the second, ….

  An encoder_decoder reads a prompt with its encoder and begins with `config.decoder_start_id`.

  Args:
    params: best as `jaxllm.models.build.unstack_layers` makes them; stacked ones work and are slower.
    prompts: token ids of each prompt, at least one, of any length below `config.max_seq_len`.
    sampling: one for all prompts, or one for each.
    tokenizer: for `text`, and needed for stop strings.
    eos_ids: tokens that end a completion unless `ignore_eos`.

  Raises:
    ConfigError: an empty prompt, one that is too long, or a token that the model does not have.
  """
  deltas = stream_tokens(graph, params, config, prompts, sampling, tokenizer=tokenizer, eos_ids=eos_ids, steps=STEPS)
  done = [delta.completion for delta in deltas if delta.completion is not None]
  return sorted(done, key=lambda completion: (completion.prompt_index, completion.index))


def stream_tokens(
  graph: nnx.GraphDef,
  params: Params,
  config: ModelConfig,
  prompts: Sequence[Sequence[int]],
  sampling: SamplingParams | Sequence[SamplingParams],
  *,
  tokenizer: Decodes | None = None,
  eos_ids: Sequence[int] = (),
  steps: int = 1,
) -> Iterator[Delta]:
  """`generate_tokens` as it happens: what each row gains from every dispatch of `steps` decode steps."""
  each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
  if len(each) != len(prompts):
    raise ConfigError(f"{len(each)} sampling settings for {len(prompts)} prompts; give one, or one for each")
  prompts = [[int(token) for token in prompt] for prompt in prompts]
  for number, prompt in enumerate(prompts):
    check_prompt(prompt, f"prompt {number + 1}" if len(prompts) > 1 else "the prompt", config)
  if config.architecture == "encoder" or config.head != "lm":
    raise ConfigError("this model has no head that writes text; it can encode, embed or classify texts")
  if any(settings.num_beams > 1 for settings in each):
    return beam.search(graph, params, config, prompts, each, tokenizer, eos_ids)
  if any(settings.prompt_logprobs is not None for settings in each):
    raise ConfigError("prompt_logprobs are not among what generate gives; `Model.__call__` gives a prompt's logits")
  rows = [
    Row(i, sample, prompt, settings, config, tokenizer, eos_ids)
    for i, (prompt, settings) in enumerate(zip(prompts, each))
    for sample in range(settings.draws)
  ]
  if any(settings.draws > settings.n for settings in each):
    return _best(_run(graph, params, config, rows, tokenizer, STEPS), each)
  return _run(graph, params, config, rows, tokenizer, steps)


def _best(deltas: Iterator[Delta], each: list[SamplingParams]) -> Iterator[Delta]:
  """The `n` most likely completions of every prompt, which nobody can know before all are finished."""
  found: list[list[Completion]] = [[] for _ in each]
  for delta in deltas:
    if delta.completion is None:
      continue
    of, number = found[delta.prompt_index], delta.prompt_index
    of.append(delta.completion)
    if len(of) < each[number].draws:
      continue
    if each[number].draws > each[number].n:
      of.sort(key=lambda one: (-(one.cumulative_logprob or 0.0), one.index))
    for index, best in enumerate(of[: each[number].n]):
      yield Delta(number, index, best.text, best.token_ids, dataclasses.replace(best, index=index))


def _run(graph, params, config: ModelConfig, rows: list[Row], tokenizer, steps: int) -> Iterator[Delta]:
  if not rows:
    return
  compute = nnx.merge(graph, params).compute
  shown = [row.settings.logprobs or 0 for row in rows if _shows(row)]
  top = min(max(shown), config.vocab_size) if shown else None
  guided = any(row.guide is not None for row in rows)

  # XLA:CPU multiplies a single 16-bit row in a scalar loop; two rows take its fast path.
  lone = len(rows) == 1 and backends.TARGETS[compute.target] == "cpu" and compute.dtype != "float32"
  batch = rows * 2 if lone else rows
  prompts = batch_prompts([row.prompt for row in batch], config)
  limits = np.asarray([row.limit for row in batch], np.int32)
  draws = sampling_rows(
    [row.settings for row in batch],
    [row.index for row in batch],
    begins=[row.begins for row in batch],
    limits=limits,
    ends=[row.ends for row in batch],
    vocab_size=config.vocab_size,
  )

  def allowed():
    everything = np.full(words_for(config.vocab_size), EVERYTHING)
    return np.stack([everything if row.guide is None else row.guide.allowed for row in batch]) if guided else None

  prefill, decode = programs(graph)
  length = bucket(int(limits.max()), config)
  state, drawn = prefill(params, prompts, draws, allowed(), cache_length=length, top=top)
  drawn = jax.tree.map(lambda x: x[None], drawn)
  while True:
    drawn = jax.tree.map(np.asarray, drawn)
    for i, row in enumerate(rows):
      if row.reason is None:
        yield _take(row, drawn, i, tokenizer)
    if all(row.reason is not None for row in rows):
      return
    # What a grammar admits is known once the token before it is.
    state, drawn = decode(params, state, limits, draws, allowed(), steps=1 if guided else steps, top=top)


def _shows(row: Row) -> bool:
  """Whether log-probabilities of its tokens are needed."""
  return row.settings.logprobs is not None or row.settings.draws > row.settings.n


def _take(row: Row, drawn: Drawn, i: int, tokenizer) -> Delta:
  """Gives the row its tokens, up to its end, from a dispatch's [steps, B] arrays."""
  first, text = len(row.tokens), ""
  for s in range(drawn.token.shape[0]):
    shown = drawn.logprobs(s, i, row.settings.logprobs or 0, tokenizer) if _shows(row) else None
    text += row.take(int(drawn.token[s, i]), shown)
    if row.reason is not None:
      break
  done = None if row.reason is None else row.completion()
  return Delta(row.prompt_index, row.index, text, tuple(row.tokens[first:]), done)
