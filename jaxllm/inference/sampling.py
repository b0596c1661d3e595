"""From logits to the next token: temperature, top-k, top-p and min-p, each row with settings of its own."""

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jaxllm.base.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How a completion is drawn and where it ends; vLLM's names, defaults and meanings.

  Raises:
    ConfigError: a value outside its range.
  """

  n: int = 1  # completions per prompt
  temperature: float = 1.0  # 0: always the most likely token
  top_k: int = 0  # only the k most likely tokens; 0 or -1: all
  top_p: float = 1.0  # only the most likely tokens that together have this probability
  min_p: float = 0.0  # only tokens at least this likely relative to the most likely one
  max_tokens: int | None = 16  # None: up to the model's max_seq_len
  stop: str | Sequence[str] = ()  # the text ends before the first of these
  stop_token_ids: Sequence[int] = ()  # the completion ends at these tokens, besides the tokenizer's end
  ignore_eos: bool = False
  seed: int | None = None  # None: a new one every time
  logprobs: int | None = None  # log-probabilities of the chosen token and of so many most likely ones
  # Over 1: beam search (see `jaxllm.inference.beam`), which draws nothing; transformers' meanings.
  num_beams: int = 1
  length_penalty: float = 1.0  # a completion's log-probability is divided by its length to this power
  # True: stop at num_beams completions; False: when no better one is likely; "never": when none can come.
  early_stopping: bool | Literal["never"] = False

  def __post_init__(self):
    def check(good, name, wants):
      if not good:
        raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {wants}")

    for name in ("stop", "stop_token_ids"):
      value = getattr(self, name)
      value = () if value is None else (value,) if isinstance(value, str | int) else tuple(value)
      object.__setattr__(self, name, value)
    if self.top_k == -1:
      object.__setattr__(self, "top_k", 0)
    check(_whole(self.n, 1), "n", "a whole number of at least 1")
    check(_number(self.temperature, 0, float("inf")), "temperature", "a finite number of at least 0")
    check(_whole(self.top_k, 0), "top_k", "a whole number of at least 1, or 0 for all tokens")
    check(_number(self.top_p, 0, 1) and self.top_p > 0, "top_p", "over 0 and at most 1")
    check(_number(self.min_p, 0, 1), "min_p", "between 0 and 1")
    check(self.max_tokens is None or _whole(self.max_tokens, 1), "max_tokens", "a whole number of at least 1")
    check(all(isinstance(s, str) and s for s in self.stop), "stop", "strings that are not empty")
    check(all(_whole(i, 0) for i in self.stop_token_ids), "stop_token_ids", "token ids of at least 0")
    check(self.seed is None or _whole(self.seed, 0) and self.seed < 2**64, "seed", "between 0 and 2^64 - 1")
    check(_whole(self.num_beams, 1), "num_beams", "a whole number of at least 1")
    check(self.num_beams == 1 or self.n <= self.num_beams, "n", f"at most num_beams ({self.num_beams}) in beam search")
    check(_number(self.length_penalty, -float("inf"), float("inf")), "length_penalty", "a finite number")
    check(self.early_stopping in (True, False, "never"), "early_stopping", "True, False or 'never'")
    for name in ("stop", "logprobs") if self.num_beams > 1 else ():
      check(getattr(self, name) in ((), None), name, "left out in beam search, which ends at tokens only")
    check(self.logprobs is None or _whole(self.logprobs, 0), "logprobs", "a whole number of at least 0")


def _whole(value, low) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= low


def _number(value, low, high) -> bool:
  whole = isinstance(value, int | float | np.number) and not isinstance(value, bool)
  return whole and low <= value <= high and value != float("inf")


def filter_logits(
  logits: Float[Array, "B V"],
  temperature: Float[Array, " B"],
  top_k: Int[Array, " B"],
  top_p: Float[Array, " B"],
  min_p: Float[Array, " B"],
) -> Float[Array, "B V"]:
  """Log-weights of the tokens that may be drawn, -inf for the others; softmax gives the probabilities.

  The order is transformers': the temperature divides the logits; top-k keeps the k highest; top-p keeps the
  fewest of those, renormalised, that reach its probability (Holtzman et al., arXiv 1904.09751); min-p keeps
  what has at least its share of the highest probability (Nguyen et al., arXiv 2407.01082), which does not
  depend on the other two. Tokens as likely as the last one kept are kept too. vLLM differs in applying
  min-p before top-p. A row of temperature 0 is treated as 1; `sample` takes its argmax.

  Args:
    top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.
  """
  vocab = logits.shape[1]
  scaled = logits.astype(jnp.float32)
  scaled = scaled - scaled.max(-1, keepdims=True)  # before the division, which could overflow
  scaled = scaled / jnp.where(temperature > 0, temperature, 1.0)[:, None]

  def cut(_):
    order = _ordered_bits(scaled)
    count = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    kth = _highest(lambda low: (order >= low).sum(-1) >= count, order)
    weights = jnp.where(order >= kth, jnp.exp(scaled), 0.0)
    enough = top_p * weights.sum(-1)
    nucleus = _highest(lambda low: jnp.where(order >= low, weights, 0.0).sum(-1) >= enough, order)
    lowest = jnp.where(top_p[:, None] < 1, jnp.maximum(kth, nucleus), kth)
    return jnp.where(order >= lowest, scaled, -jnp.inf)

  kept = jax.lax.cond(jnp.any(top_k > 0) | jnp.any(top_p < 1), cut, lambda _: scaled, None)
  return jnp.where(scaled >= jnp.log(min_p)[:, None], kept, -jnp.inf)  # the highest of `scaled` is 0


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


def sample(
  logits: Float[Array, "B V"],
  keys: Key[Array, " B"],
  temperature: Float[Array, " B"],
  top_k: Int[Array, " B"],
  top_p: Float[Array, " B"],
  min_p: Float[Array, " B"],
) -> Int[Array, " B"]:
  """A token for each row from its filtered distribution (see `filter_logits`); temperature 0: the argmax.

  A row's token depends on its own logits, key and settings only, not on the batch that it is in.
  """
  greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

  def draw(_):
    weights = filter_logits(logits, temperature, top_k, top_p, min_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    drawn = jnp.argmax(weights + noise, axis=-1).astype(jnp.int32)
    return jnp.where(temperature > 0, drawn, greedy)

  return jax.lax.cond(jnp.any(temperature > 0), draw, lambda _: greedy, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
  """The settings of a batch as arrays, one entry a row."""

  seeds: UInt32[Array, "B 2"]
  temperature: Float[Array, " B"]
  top_k: Int[Array, " B"]
  top_p: Float[Array, " B"]
  min_p: Float[Array, " B"]

  def draw(self, logits: Float[Array, "B V"], positions: Int[Array, " B"]) -> Int[Array, " B"]:
    """Tokens for these positions: a row's stream is a function of its seed and the position."""
    keys = jax.random.wrap_key_data(self.seeds, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    return sample(logits, keys, self.temperature, self.top_k, self.top_p, self.min_p)


def sampling_rows(settings: Sequence[SamplingParams], samples: Sequence[int]) -> SamplingRows:
  """Row i draws by settings[i], as completion number samples[i] of its prompt."""
  entropy = [
    (secrets.randbits(64) if row.seed is None else int(row.seed), sample)
    for row, sample in zip(settings, samples, strict=True)
  ]
  column = lambda name, dtype: np.asarray([getattr(row, name) for row in settings], dtype)  # noqa: E731
  return SamplingRows(
    seeds=np.stack([np.random.SeedSequence(words).generate_state(2) for words in entropy]),
    temperature=column("temperature", np.float32),
    top_k=np.minimum(column("top_k", np.int64), 2**31 - 1).astype(np.int32),
    top_p=column("top_p", np.float32),
    min_p=column("min_p", np.float32),
  )
