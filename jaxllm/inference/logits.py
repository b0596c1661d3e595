"""What is done to logits before a token is drawn: biases, penalties, and tokens that may not come.

Everything is an array with one entry a row, so one compiled step serves any mix of settings, and a step whose rows
ask for nothing pays a few comparisons of [B]. What depends on the tokens before a position is computed
from those tokens, nothing is counted from step to step: so any position can be asked for, in any order, and a
draft's positions get the logits that they would get one by one.
"""

import dataclasses
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt32

from jaxllm.base.errors import ConfigError
from jaxllm.inference.params import SamplingParams, check_vocabulary

EVERYTHING = np.uint32(0xFFFFFFFF)
Biased = tuple[tuple[int, ...], float]  # a sequence, and the bias of its last token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitRules:
  """The settings of a batch that change logits, one entry a row. A set of tokens is packed, 32 a word (see `pack`).

  Positions count the row's tokens from the first one of its prompt.
  """

  begins: Int32[Array, " B"]  # the position of the completion's first token
  last: Int32[Array, " B"]  # the position of its last token, if nothing ends it earlier
  ends_from: Int32[Array, " B"]  # no token of `ends` is drawn at an earlier position
  repetition: Float32[Array, " B"]
  presence: Float32[Array, " B"]
  frequency: Float32[Array, " B"]
  source_penalty: Float32[Array, " B"]  # multiplies the positive logits of `source`, divides the negative ones
  decay: Float32[Array, " B"]  # the logits of `ends` grow by it with each position
  decay_from: Int32[Array, " B"]  # behind this one
  normalize: Bool[Array, " B"]  # the results are log-probabilities
  ngram: Int32[Array, " B"]  # 0: any may come again
  forced_first: UInt32[Array, "B W"]  # one of these; empty: none is forced
  forced_last: UInt32[Array, "B W"]
  allowed: UInt32[Array, "B W"]
  allowed_first: UInt32[Array, "B W"]  # at the first position at which no token is forced
  ends: UInt32[Array, "B W"]
  source: UInt32[Array, "B W"]  # the tokens of what the completion was asked by
  # A bias for the last token of a sequence, where the tokens before it have just been seen; -1 fills from the left.
  sequences: Int32[Array, "B S L"]
  bias: Float32[Array, "B S"]

  def apply(
    self,
    logits: Float[Array, "B V"],
    positions: Int[Array, " B"],
    history: Int[Array, "B T"],
    allowed: UInt32[Array, "B W"] | None = None,
  ) -> Float32[Array, "B V"]:
    """The logits from which the tokens at `positions` are drawn, -inf where none may be.

    In transformers' order where the order matters: biases; the penalties of what is not in the source and of what has
    come (Keskar et al., arXiv 1909.05858), then vLLM's presence and frequency penalties; what may not come; what
    must.

    Args:
      history: each row's tokens, read before `positions` only.
      allowed: further tokens that may come, from a grammar for example.
    """
    own_first = self.begins + jnp.any(self.forced_first != 0, axis=1)  # that is not forced
    words = self.allowed & jnp.where((positions == own_first)[:, None], self.allowed_first, EVERYTHING)
    words &= jnp.where((positions < self.ends_from)[:, None], ~self.ends, EVERYTHING)
    words = words if allowed is None else words & allowed
    forced = jnp.where((positions == self.last)[:, None], self.forced_last, 0)
    first = (positions == self.begins)[:, None] & ~jnp.any(forced != 0, axis=1, keepdims=True)
    forced = jnp.where(first, self.forced_first, forced)

    biased, repeats = jnp.any(self.bias != 0), jnp.any(self.ngram > 0)
    penalized = jnp.any((self.repetition != 1) | (self.presence != 0) | (self.frequency != 0))
    of_source = jnp.any(self.source_penalty != 1)
    grown = jnp.where(self.decay == 1, 0, jnp.maximum(positions - self.decay_from, 0))
    masked, forces, grows = jnp.any(words != EVERYTHING), jnp.any(forced != 0), jnp.any(grown > 0)
    normal = jnp.any(self.normalize)

    def change(logits):
      vocab = logits.shape[1]
      logits = _where(biased, lambda x: x + self._biases(vocab, positions, history), logits)
      logits = _where(of_source, self._of_source, logits)
      logits = _where(penalized, lambda x: self._penalize(x, positions, history), logits)
      logits = _where(repeats, lambda x: jnp.where(self._repeated(vocab, positions, history), -jnp.inf, x), logits)
      logits = _where(grows, lambda x: self._grow_ends(x, grown), logits)
      logits = _where(masked, lambda x: jnp.where(unpack(words, vocab), x, -jnp.inf), logits)
      only = jnp.where(unpack(forced, vocab), 0.0, -jnp.inf)
      logits = jnp.where(jnp.any(forced != 0, axis=1, keepdims=True), only, logits)
      own = lambda x: jnp.where(self.normalize[:, None], jax.nn.log_softmax(x), x)  # noqa: E731
      return _where(normal, own, logits)

    # One question for all: each one that is asked costs a copy of the logits.
    asked = biased | of_source | penalized | repeats | grows | masked | forces | normal
    return _where(asked, change, logits.astype(jnp.float32))

  def _biases(self, vocab, positions, history) -> Float32[Array, "B V"]:
    before = jnp.arange(1 - self.sequences.shape[2], 0)  # L - 1 places
    places = positions[:, None] + before
    seen = jnp.take_along_axis(history, jnp.maximum(places, 0), axis=1)
    seen = jnp.where(places >= 0, seen, -2)[:, None]
    wanted = self.sequences[:, :, :-1]
    holds = jnp.all((wanted == seen) | (wanted == -1), axis=2)
    return _scatter(vocab, self.sequences[:, :, -1], jnp.where(holds, self.bias, 0.0))

  def _of_source(self, logits) -> Float32[Array, "B V"]:
    factor = 1 / self.source_penalty[:, None]
    changed = jnp.where(logits < 0, logits * factor, logits / factor)
    return jnp.where(unpack(self.source, logits.shape[1]), changed, logits)

  def _grow_ends(self, logits, steps) -> Float32[Array, "B V"]:
    more = jnp.abs(logits) * (self.decay ** steps.astype(jnp.float32) - 1)[:, None]
    return jnp.where(unpack(self.ends, logits.shape[1]) & jnp.isfinite(logits), logits + more, logits)

  def _penalize(self, logits, positions, history) -> Float32[Array, "B V"]:
    places = jnp.arange(history.shape[1])
    before = places < positions[:, None]
    drawn = before & (places >= self.begins[:, None])
    seen = _scatter(logits.shape[1], history, before.astype(jnp.float32)) > 0
    counts = _scatter(logits.shape[1], history, drawn.astype(jnp.float32))
    penalty = self.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    return logits - self.frequency[:, None] * counts - self.presence[:, None] * (counts > 0)

  def _repeated(self, vocab, positions, history) -> Bool[Array, "B V"]:
    """Tokens that would end a run of `ngram` tokens which the row has already."""
    places = jnp.arange(history.shape[1])
    # Place t ends such a run if the ngram - 1 tokens before it are those before the position.
    matches = (places < positions[:, None]) & (places >= self.ngram[:, None] - 1) & (self.ngram > 0)[:, None]

    def compare(back, matches):
      last = jnp.take_along_axis(history, jnp.maximum(positions - back, 0)[:, None], axis=1)
      same = jnp.roll(history, back, axis=1) == last
      return matches & (same | (back >= self.ngram)[:, None])

    matches = jax.lax.fori_loop(1, jnp.minimum(self.ngram.max(), history.shape[1]), compare, matches)
    return _scatter(vocab, history, matches.astype(jnp.float32)) > 0


def _where(condition, change, logits):
  return jax.lax.cond(condition, change, lambda x: x, logits)


def _scatter(vocab: int, tokens: Int[Array, "B T"], values: Float[Array, "B T"]) -> Float32[Array, "B V"]:
  """The sum of `values` for each token; a negative token is none."""
  rows = jnp.arange(tokens.shape[0])[:, None]
  zeros = jnp.zeros((tokens.shape[0], vocab), jnp.float32)
  return zeros.at[rows, jnp.where(tokens < 0, vocab, tokens)].add(values, mode="drop")


def pack(tokens: Collection[int], vocab_size: int) -> UInt32[np.ndarray, " W"]:
  """A set of tokens, 32 a word, the lowest bit first; one that the vocabulary lacks (an end that a config names, -1 for
  none) is never drawn and so left out."""
  bits = np.zeros(words_for(vocab_size) * 32, bool)
  bits[[token for token in tokens if 0 <= token < vocab_size]] = True
  return np.packbits(bits, bitorder="little").view("<u4")


def words_for(vocab_size: int) -> int:
  """Words of a packed set."""
  return -(-vocab_size // 32)


def unpack(words: UInt32[Array, "B W"], vocab_size: int) -> Bool[Array, "B V"]:
  """Which tokens are in packed sets."""
  bits = words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
  return bits.reshape(words.shape[0], -1)[:, :vocab_size].astype(bool)


def logit_rules(
  settings: Sequence[SamplingParams],
  *,
  begins: Sequence[int],
  limits: Sequence[int],
  ends: Sequence[Collection[int]],
  vocab_size: int,
  sequences: tuple[int, int] | None = None,
  sources: Sequence[Sequence[int]] | None = None,
) -> LogitRules:
  """The rules of rows, as NumPy arrays.

  Args:
    settings: without `bad_words`, which `jaxllm.inference.params.with_word_ids` spells.
    begins: how many tokens each row's prompt has.
    limits: how many tokens it may have, the prompt's included.
    ends: tokens that end a row's completion.
    sequences: how many biased sequences a row may have, single tokens included, and of what length: shapes of
      the arrays, and so of what is compiled. None: as many as there are, rounded up to powers of two.
    sources: each row's prompt; of an encoder_decoder what the encoder reads. None: no setting asks for them.

  Raises:
    ConfigError: a token that the model does not have, or more or longer sequences than `sequences` has room for.
  """
  for one in settings:
    check_vocabulary(one, vocab_size)
  sources = [()] * len(settings) if sources is None else sources
  biased = [biased_runs(one, source) for one, source in zip(settings, sources, strict=True)]
  if sequences is None:
    sequences = _power(max(map(len, biased))), _power(max((len(ids) for row in biased for ids, _ in row), default=1))
  column = lambda name, dtype: np.asarray([getattr(one, name) for one in settings], dtype)  # noqa: E731
  packed = lambda name: np.stack([pack(one.named_tokens()[name], vocab_size) for one in settings])  # noqa: E731
  starts = np.asarray(begins, np.int32)
  tables = [_table(row, *sequences) for row in biased]
  decays = [one.exponential_decay_length_penalty or (0, 1.0) for one in settings]
  read = [set(source) if one.encoder_repetition_penalty != 1 else () for one, source in zip(settings, sources)]
  return LogitRules(
    begins=starts,
    last=np.asarray(limits, np.int32) - 1,
    ends_from=np.maximum(starts + column("min_tokens", np.int32), column("min_length", np.int32)),
    repetition=column("repetition_penalty", np.float32),
    presence=column("presence_penalty", np.float32),
    frequency=column("frequency_penalty", np.float32),
    source_penalty=column("encoder_repetition_penalty", np.float32),
    decay=np.asarray([factor for _, factor in decays], np.float32),
    decay_from=starts + np.asarray([start for start, _ in decays], np.int32),
    normalize=column("renormalize_logits", bool),
    ngram=np.minimum(column("no_repeat_ngram_size", np.int64), 2**31 - 1).astype(np.int32),
    forced_first=packed("forced_bos_token_id"),
    forced_last=packed("forced_eos_token_id"),
    allowed=np.stack([_allowed(one, source, vocab_size) for one, source in zip(settings, sources)]),
    allowed_first=~packed("begin_suppress_tokens"),
    ends=np.stack([pack(one, vocab_size) for one in ends]),
    source=np.stack([pack(one, vocab_size) for one in read]),
    sequences=np.stack([tokens for tokens, _ in tables]),
    bias=np.stack([bias for _, bias in tables]),
  )


def _allowed(settings: SamplingParams, source: Sequence[int], vocab_size: int) -> UInt32[np.ndarray, " W"]:
  never = {*settings.suppress_tokens, *(ids[0] for ids in settings.bad_words_ids if len(ids) == 1)}
  never |= set(source) if settings.encoder_no_repeat_ngram_size == 1 else set()
  only = settings.allowed_token_ids
  return ~pack(never, vocab_size) & (EVERYTHING if only is None else pack(only, vocab_size))


def biased_runs(settings: SamplingParams, source: Sequence[int]) -> list[Biased]:
  """Sequences and the bias of their last token; those of one token that never come are masked instead.

  Args:
    source: of whose runs of `encoder_no_repeat_ngram_size` tokens none may come.
  """
  biased: list[Biased] = [((int(token),), bias) for token, bias in (settings.logit_bias or {}).items()]
  biased += [(tuple(ids), bias) for ids, bias in (settings.sequence_bias or {}).items()]
  size = settings.encoder_no_repeat_ngram_size
  runs = {tuple(source[i : i + size]) for i in range(len(source) - size + 1)} if size > 1 else set()
  runs |= {ids for ids in settings.bad_words_ids if len(ids) > 1}
  return biased + [(ids, -np.inf) for ids in sorted(runs)]


def _table(biased: Sequence[Biased], count: int, length: int):
  if len(biased) > count:
    raise ConfigError(f"{len(biased)} biased tokens and banned sequences; there is room for {count} (max_biases)")
  tokens, bias = np.full((count, length), -1, np.int32), np.zeros(count, np.float32)
  for n, (ids, value) in enumerate(biased):
    if len(ids) > length:
      raise ConfigError(f"a biased or banned sequence of {len(ids)} tokens; there is room for {length} (max_biases)")
    tokens[n, length - len(ids) :], bias[n] = ids, value
  return tokens, bias


def _power(value: int) -> int:
  return 1 << max(value - 1, 0).bit_length()
