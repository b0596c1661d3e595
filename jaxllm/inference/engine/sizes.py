"""The shapes of an engine: how many rows, tokens and pages, and which of them a step is compiled for."""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import backends, cpu_ffi
from jaxllm.models.config import Compute, ModelConfig

KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
SMALLEST = 16  # tokens of the smallest packed step, and of the smallest text that an encoder reads


@dataclasses.dataclass(frozen=True)
class Shape:
  """What a step is compiled for: its rows; its tokens, packed or of each row; the drafts that a row may have."""

  rows: int
  tokens: int  # 1 without drafts: a token a row
  drafts: int = 0


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of an engine; `rows`, `tokens` and `drafts` are those of its steps, in ascending order."""

  slots: int
  max_model_len: int
  max_source_len: int  # of an encoder_decoder's prompt
  page_size: int
  pages: dict[str, int]
  kv_dtype: str
  step_tokens: int  # of all rows together at most
  rows: tuple[int, ...]  # of steps with one token a row
  tokens: tuple[int, ...]  # of other steps: packed, or of each row
  drafts: tuple[int, ...]  # of steps with drafts: of each row
  top: int  # log-probabilities of the likeliest tokens
  sequences: tuple[int, int]  # biased tokens and sequences of a request, and their length
  packed: bool  # the tokens of a step stand back to back
  processed: bool  # log-probabilities are those after the settings' rules, not normalized again
  by_slot: bool  # a row stands where its slot is: with encoded text beside it, which lies by slot

  @property
  def max_pages(self) -> int:
    return -(-self.max_model_len // self.page_size)

  def longest_prompt(self, draws: bool = True) -> tuple[int, str]:
    """Tokens of a prompt, behind which another is drawn or not, and what limits them."""
    if self.by_slot:
      return self.max_source_len, f"max_source_len {self.max_source_len}"
    return self.max_model_len - draws, f"max_model_len {self.max_model_len}"

  def shape_for(self, counts: Sequence[int], drafts: int = 0) -> Shape:
    """The smallest step for rows with so many tokens each, of which at most `drafts` are drafts."""
    most, rows = max(counts), self.rows[-1] if self.by_slot else next(n for n in self.rows if n >= len(counts))
    if drafts:
      deep = next(n for n in self.drafts if n >= drafts)
      return self._with_drafts(rows, deep)
    if most == 1:
      return Shape(rows, 1)
    if not self.packed:
      return Shape(self.rows[-1], next(n for n in self.tokens if n >= most))
    tokens = next(n for n in self.tokens if n >= sum(counts))
    return Shape(min(self.rows[-1], tokens), tokens)

  def shapes(self) -> list[Shape]:
    """All that `shape_for` gives."""
    alone = self.rows[-1:] if self.by_slot else self.rows
    decode = [Shape(n, 1) for n in alone]
    mixed = [Shape(min(self.rows[-1], n) if self.packed else self.rows[-1], n) for n in self.tokens]
    drafted = [self._with_drafts(n, deep) for n in (alone if self.packed else self.rows[-1:]) for deep in self.drafts]
    return decode + mixed + drafted

  def _with_drafts(self, rows: int, deep: int) -> Shape:
    return Shape(rows, rows * (deep + 1), deep) if self.packed else Shape(self.rows[-1], deep + 1, deep)


def packs(config: ModelConfig) -> bool:
  """Whether the tokens of a step may stand back to back; relative positions, sink tokens and cross-attention need them
  row by row."""
  return config.architecture == "decoder" and config.position != "relative" and not config.sink_tokens


def buckets(low: int, high: int) -> tuple[int, ...]:
  """`low` times powers of two, and `high`."""
  sizes = [high]
  while low < high:
    sizes.append(low)
    low *= 2
  return tuple(sorted(sizes))


def engine_sizes(
  config: ModelConfig,
  compute: Compute,
  *,
  max_num_seqs: int,
  max_model_len: int | None,
  num_pages: int | Mapping[str, int] | None,
  page_size: int,
  max_tokens_per_step: int | None,
  kv_dtype: str | None,
  max_logprobs: int,
  processed_logprobs: bool,
  max_biases: tuple[int, int],
  max_drafts: int,
  row_buckets: Sequence[int] | None,
  token_buckets: Sequence[int] | None,
  max_source_len: int | None = None,
) -> Sizes:
  """The sizes that an `Engine` with these settings has.

  Raises:
    ConfigError: one is impossible.
  """
  longest = config.max_seq_len if max_model_len is None else max_model_len
  limit = config.max_seq_len if config.has_length_limit else None
  counts = num_pages.values() if isinstance(num_pages, Mapping) else [] if num_pages is None else [num_pages]
  if not isinstance(max_biases, Sequence) or len(max_biases) != 2:
    raise ConfigError(f"max_biases is {max_biases!r}; it must be two numbers, of sequences and of their tokens")
  for name, value, least, most in (
    *(("num_pages", count, 1, None) for count in counts),
    ("max_num_seqs", max_num_seqs, 1, None),
    ("max_model_len", longest, 1, limit),
    *(() if max_source_len is None else [("max_source_len", max_source_len, 1, limit)]),
    ("page_size", page_size, 1, None),
    *(() if max_tokens_per_step is None else [("max_tokens_per_step", max_tokens_per_step, 1, None)]),
    ("max_logprobs", max_logprobs, 0, None),
    *(("max_biases", size, 1, None) for size in max_biases),
    *(("row_buckets", size, 1, None) for size in row_buckets or ()),
    *(("token_buckets", size, 1, None) for size in token_buckets or ()),
  ):
    if not isinstance(value, int) or isinstance(value, bool):
      raise ConfigError(f"{name} is {value!r}; it must be a whole number")
    if value < least or most is not None and value > most:
      raise ConfigError(f"{name} is {value}; it must be at least {least}" + (f" and at most {most}" if most else ""))
  if max_tokens_per_step is None:
    max_tokens_per_step = max(max_num_seqs, min(512, max_num_seqs * longest))
  if max_tokens_per_step < max_num_seqs:
    raise ConfigError(
      f"max_tokens_per_step is {max_tokens_per_step}; each of max_num_seqs = {max_num_seqs} sequences needs one of it"
    )
  if kv_dtype not in (None, *KV_DTYPES):
    raise ConfigError(f"the dtype of keys and values is {kv_dtype!r}; choose one of {', '.join(KV_DTYPES)}")
  on_cpu, packed = backends.TARGETS[compute.target] == "cpu", packs(config)
  # XLA:CPU multiplies a single 16-bit row in a scalar loop; two rows take its fast path. Our own kernel needs no two.
  own = compute.matmul in ("auto", "cpu") and compute.dtype == "bfloat16" and cpu_ffi.available() if on_cpu else False
  few = 2 if on_cpu and compute.dtype != "float32" and not own else 1
  most = max_tokens_per_step if packed else max(1, max_tokens_per_step // max_num_seqs)
  least = min(SMALLEST, most) if packed else most
  decode, mixed = (
    tuple(sorted({*(n for n in asked or buckets(low, high) if n < high), high}))
    for asked, low, high in ((row_buckets, few, max(few, max_num_seqs)), (token_buckets, least, most))
  )
  return Sizes(
    slots=max_num_seqs,
    max_model_len=longest,
    max_source_len=max_source_len or max(longest, config.max_seq_len),
    page_size=page_size,
    pages=_pages(config, longest, max_num_seqs, page_size, max_tokens_per_step, num_pages),
    # XLA for CPU of jax 0.10 goes through all 16-bit pages for each token that it writes: 170 tokens a second became 95
    # (SmolLM2-135M, 8 rows, 200 pages), and fewer with more pages.
    kv_dtype=kv_dtype or ("float32" if on_cpu else compute.dtype),
    step_tokens=max_tokens_per_step,
    rows=decode,
    tokens=mixed,
    drafts=tuple(sorted({min(2, max_drafts), max_drafts})) if max_drafts else (),
    top=min(max_logprobs, config.vocab_size),
    sequences=max_biases,
    packed=packed,
    processed=processed_logprobs,
    by_slot=config.architecture == "encoder_decoder",
  )


def _pages(config: ModelConfig, longest, rows, page_size, step_tokens, num_pages) -> dict[str, int]:
  kinds = sorted({"local" if kind == "local" else "global" for kind in config.layer_kinds})
  every = -(-longest // page_size) * rows
  if isinstance(num_pages, Mapping):
    pages = {kind: num_pages.get(kind, 0) for kind in kinds}
  else:
    pages = dict.fromkeys(kinds, every if num_pages is None else num_pages)
  if num_pages is None and "local" in kinds:
    seen = config.sliding_window + config.sink_tokens + step_tokens + 2 * page_size
    pages["local"] = min(every, -(-seen // page_size) * rows)
  if min(pages.values()) < 1:
    raise ConfigError(f"num_pages is {num_pages}; it must be at least 1 of each kind: {', '.join(kinds)}")
  return pages
