"""From logits to the next token, each row with settings of its own."""

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jaxllm.inference.logits import LogitRules, logit_rules
from jaxllm.inference.params import SamplingParams

MOST_BY_ENTROPY = 100  # tokens that top-h looks at, as transformers does


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cuts:
  """Which tokens may be drawn, one entry a row; see `filter_logits`."""

  temperature: Float[Array, " B"]
  top_k: Int[Array, " B"]  # 0 keeps all
  top_p: Float[Array, " B"]  # 1 keeps all
  min_p: Float[Array, " B"]  # 0 keeps all
  typical_p: Float[Array, " B"]  # 1 keeps all
  top_h: Float[Array, " B"]  # over 1 keeps all
  epsilon: Float[Array, " B"]  # 0 keeps all
  eta: Float[Array, " B"]  # 0 keeps all


def filter_logits(logits: Float[Array, "B V"], cuts: Cuts) -> Float[Array, "B V"]:
  """Log-weights of the tokens that may be drawn, -inf for the others; softmax gives the probabilities.

  The order is transformers': the temperature divides the logits; top-h keeps the likeliest tokens that together have
  this share of the entropy of the `MOST_BY_ENTROPY` likeliest (Potraghloo et al., arXiv 2509.02510); top-k keeps the k
  highest; top-p keeps the fewest of those, renormalised, that reach its probability (Holtzman et al., arXiv
  1904.09751); min-p keeps what has at least its share of the highest probability (Nguyen et al., arXiv 2407.01082),
  which does not depend on the other two; typical-p keeps, of what is left, the fewest tokens of that probability whose
  surprise is nearest to the expected one (Meister et al., arXiv 2202.00666); epsilon and eta drop what is less likely
  than they say (Hewitt et al., arXiv 2210.15191). Tokens as likely as the last one kept are kept too. vLLM differs in
  applying min-p before top-p. A row of temperature 0 is treated as 1; `sample` takes its argmax.
  """
  vocab = logits.shape[1]
  scaled = logits.astype(jnp.float32)
  scaled = scaled - scaled.max(-1, keepdims=True)  # before the division, which could overflow
  scaled = scaled / jnp.where(cuts.temperature > 0, cuts.temperature, 1.0)[:, None]
  scaled = jax.lax.cond(jnp.any(cuts.top_h <= 1), lambda x: _by_entropy(x, cuts.top_h), lambda x: x, scaled)

  def cut(_):
    order = _ordered_bits(scaled)
    count = jnp.where(cuts.top_k > 0, jnp.minimum(cuts.top_k, vocab), vocab)
    kth = _highest(lambda low: (order >= low).sum(-1) >= count, order)
    weights = jnp.where(order >= kth, jnp.exp(scaled), 0.0)
    enough = cuts.top_p * _total(weights)
    nucleus = _highest(lambda low: _total(jnp.where(order >= low, weights, 0.0)) >= enough, order)
    lowest = jnp.where(cuts.top_p[:, None] < 1, jnp.maximum(kth, nucleus), kth)
    return jnp.where(order >= lowest, scaled, -jnp.inf)

  kept = jax.lax.cond(jnp.any(cuts.top_k > 0) | jnp.any(cuts.top_p < 1), cut, lambda _: scaled, None)
  kept = jnp.where(scaled >= jnp.log(cuts.min_p)[:, None], kept, -jnp.inf)  # the highest of `scaled` is 0
  kept = jax.lax.cond(jnp.any(cuts.typical_p < 1), lambda x: _typical(x, cuts.typical_p), lambda x: x, kept)
  unlikely = jnp.any((cuts.epsilon > 0) | (cuts.eta > 0))
  return jax.lax.cond(unlikely, lambda x: _likely(x, cuts.epsilon, cuts.eta), lambda x: x, kept)


def _logprobs(logits: Float[Array, "B V"]) -> tuple[Float[Array, "B V"], Float[Array, "B V"], Float[Array, " B"]]:
  """Log-probabilities, probabilities and their entropy in nats."""
  highest = logits.max(-1, keepdims=True)
  logprobs = logits - highest - jnp.log(_total(jnp.exp(logits - highest)))[:, None]
  weights = jnp.exp(logprobs)
  return logprobs, weights, -_total(jnp.where(weights > 0, weights * logprobs, 0.0))


def _by_entropy(logits: Float[Array, "B V"], share: Float[Array, " B"]) -> Float[Array, "B V"]:
  # Values by their places: over several TPUs XLA (libtpu 0.0.48) dies of a top-k whose places nobody reads.
  places = jax.lax.top_k(logits, min(MOST_BY_ENTROPY, logits.shape[1]))[1]
  top = jnp.take_along_axis(logits, places, axis=-1)
  logprobs, weights, entropy = _logprobs(top)
  reached = jnp.cumsum(jnp.where(weights > 0, -weights * logprobs, 0.0), axis=-1)
  count = jnp.maximum((reached <= (entropy * share)[:, None]).sum(-1), 1)
  lowest = jnp.take_along_axis(top, count[:, None] - 1, axis=-1)
  return jnp.where((logits >= lowest) | (share > 1)[:, None], logits, -jnp.inf)


def _typical(logits: Float[Array, "B V"], mass: Float[Array, " B"]) -> Float[Array, "B V"]:
  logprobs, weights, entropy = _logprobs(logits)
  order = _ordered_bits(-jnp.abs(logprobs + entropy[:, None]))
  lowest = _highest(lambda low: _total(jnp.where(order >= low, weights, 0.0)) >= mass, order)
  return jnp.where((order >= lowest) | (mass >= 1)[:, None], logits, -jnp.inf)


def _likely(logits: Float[Array, "B V"], epsilon: Float[Array, " B"], eta: Float[Array, " B"]) -> Float[Array, "B V"]:
  best = logits >= logits.max(-1, keepdims=True)
  logits = jnp.where((_logprobs(logits)[1] >= epsilon[:, None]) | best, logits, -jnp.inf)
  _, weights, entropy = _logprobs(logits)
  least = jnp.minimum(eta, jnp.sqrt(eta) * jnp.exp(-entropy))
  return jnp.where((weights >= least[:, None]) | best, logits, -jnp.inf)


def _total(x: Float[Array, "B V"]) -> Float[Array, " B"]:
  """The sum of each row in one order, however many rows there are: XLA:CPU's own changes with them."""
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(x.shape[0], -1, 32).sum(1)
  for half in (16, 8, 4, 2, 1):
    x = x[:, :half] + x[:, half:]
  return x[:, 0]


def _ordered_bits(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
  """Integers in the order of the floats."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _highest(
  holds: Callable[[UInt32[Array, "B 1"]], Bool[Array, " B"]], order: UInt32[Array, "B V"]
) -> UInt32[Array, "B 1"]:
  """The highest value of each row for which `holds`, which is true below it and false above.

  Found bit by bit: 32 passes over the row take an eighth of the time that XLA:CPU needs to sort it.
  """

  def settle(i, low):
    higher = low | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    return jnp.where(holds(higher)[:, None], higher, low)

  return jax.lax.fori_loop(0, 32, settle, jnp.zeros((order.shape[0], 1), jnp.uint32))


def sample(logits: Float[Array, "B V"], keys: Key[Array, " B"], cuts: Cuts) -> Int[Array, " B"]:
  """A token for each row from its filtered distribution (see `filter_logits`); temperature 0: the argmax.

  A row's token depends on its own logits, key and settings only, not on the batch that it is in. It is -1 where there
  is none to draw: every logit is -inf, or one is infinite or no number.
  """
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def draw(_):
    weights = filter_logits(logits, cuts)
    # XLA:CPU would compute the noise inside the search, number by number.
    noisy = jax.lax.optimization_barrier(weights + _gumbel(keys, logits.shape[1]))
    drawn = jnp.argmax(noisy == noisy.max(-1, keepdims=True), axis=-1).astype(jnp.int32)
    return jnp.where(cuts.temperature > 0, drawn, greedy)

  token = jax.lax.cond(jnp.any(cuts.temperature > 0), draw, lambda _: greedy, None)
  highest = jnp.take_along_axis(logits, greedy[:, None], axis=-1)[:, 0]  # NaN if one is: argmax finds it
  return jnp.where(jnp.isfinite(highest), token, -1)


def _gumbel(keys: Key[Array, " B"], vocab: int) -> Float[Array, "B V"]:
  """Gumbel noise for every token, of 32 bits each: a hash of the token that the row's key chooses.

  So that drawing 16 tokens of 49,152 does not cost more than the model: threefry takes twenty rounds for two numbers.
  Each token has noise of its own, so that a draft model's draws agree with the large one's: a draw by one number a row
  and cumulated weights would be cheaper, but there a small difference early in the vocabulary moves all behind it.
  """
  first, second = jnp.moveaxis(jax.random.key_data(keys), -1, 0)[:, :, None]
  bits = _mixed(_mixed(jnp.arange(vocab, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9) + first) ^ second)
  u = jnp.minimum(bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
  # -log(1 - u), exact where u is small: a token that is drawn is one whose exponential is about 1 / V.
  exponential = jnp.where(u < 1 / 64, u * (1 + u * (1 / 2 + u * (1 / 3 + u / 4))), -jnp.log(1 - u))
  return -jnp.log(exponential)


def _mixed(x: UInt32[Array, "B V"]) -> UInt32[Array, "B V"]:
  """Each bit of the result depends on all of x (the constants of C. Wellons' lowbias32, found by search)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
  """The settings of a batch as arrays, one entry a row."""

  seeds: UInt32[Array, "B 2"]
  cuts: Cuts
  rules: LogitRules

  def draw(
    self,
    logits: Float[Array, "B V"],
    positions: Int[Array, " B"],
    history: Int[Array, "B T"],
    allowed: UInt32[Array, "B W"] | None = None,
  ) -> Int[Array, " B"]:
    """Tokens for these positions (-1: none can be drawn, see `sample`).

    A row's token is a function of its settings, its seed, the position and what is before it. So the tokens
    of several positions of one request may be drawn at once: give it a row for each, see `take`.

    Args:
      positions: how many tokens are before each, the prompt's included.
      history: the row's tokens, of which those before the position are read.
      allowed: the tokens that a grammar admits, see `jaxllm.inference.guided`.
    """
    logits = self.rules.apply(logits, positions, history, allowed)
    keys = jax.random.wrap_key_data(self.seeds, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    return sample(logits, keys, self.cuts)

  def take(self, rows: Int[Array, " N"]) -> "SamplingRows":
    """The settings of these rows."""
    return jax.tree.map(lambda x: x[rows], self)


def sampling_rows(settings: Sequence[SamplingParams], samples: Sequence[int], **facts: Any) -> SamplingRows:
  """Row i draws by settings[i], as completion number samples[i] of its prompt; `facts`: see `logit_rules`."""
  entropy = [
    (secrets.randbits(64) if row.seed is None else int(row.seed), sample)
    for row, sample in zip(settings, samples, strict=True)
  ]
  column = lambda name, dtype: np.asarray([getattr(row, name) for row in settings], dtype)  # noqa: E731
  least, most = np.finfo(np.float32).tiny, np.finfo(np.float32).max  # a share of 0 would keep nothing
  return SamplingRows(
    seeds=np.stack([np.random.SeedSequence(words).generate_state(2) for words in entropy]),
    cuts=Cuts(
      temperature=np.minimum(column("temperature", np.float64), most).astype(np.float32),
      top_k=np.minimum(column("top_k", np.int64), 2**31 - 1).astype(np.int32),
      top_p=np.maximum(column("top_p", np.float32), least),
      min_p=column("min_p", np.float32),
      typical_p=np.maximum(column("typical_p", np.float32), least),
      top_h=np.asarray([2 if row.top_h is None else row.top_h for row in settings], np.float32),
      epsilon=column("epsilon_cutoff", np.float32),
      eta=column("eta_cutoff", np.float32),
    ),
    rules=logit_rules(settings, **facts),
  )
