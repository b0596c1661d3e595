"""What the rows of a batch are made of: one class for each `data.task`, and `make_task`, which chooses.

A task says how documents are packed into rows and what stands in a row; what it draws comes from the generator
that it is given. Tasks travel to worker processes, so they hold plain values only.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from jaxllm.base.errors import DataError
from jaxllm.data import corruption
from jaxllm.data.config import CorruptionConfig, DataConfig
from jaxllm.data.examples import CHAT, IGNORED, unpacked
from jaxllm.data.manifest import Prepared
from jaxllm.data.packing import (
  Packing,
  Piece,
  Pieces,
  Plan,
  TablePlan,
  cut_documents,
  fit_pieces,
  make_plan,
  order_of,
)
from jaxllm.data.shards import TokenDocuments
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.data.words import Words, words_of

Row = dict[str, Any]  # arrays by name; of a preference two such rows
Counts = Int[np.ndarray, " documents *parts"]  # tokens of each document, or of each part of an example
Ids = Int[np.ndarray, " tokens"]


class Task(Protocol):
  def plan(self, counts: Counts, packing: Packing, seed: int | None) -> Plan: ...

  def row(self, pieces: list[Piece], documents: TokenDocuments, rng: np.random.Generator) -> Row: ...


def empty_row(config: DataConfig, seq_len: int) -> Row:
  """A row of padding: the names, shapes and dtypes that every row of the task has."""
  names = ("inputs", "targets", "positions", "segment_ids")
  if config.task == "preference":
    return {side: empty_row(dataclasses.replace(config, task="chat"), seq_len) for side in ("chosen", "rejected")}
  if config.task in _ENCODER_DECODER:
    row = _zeros(names, target_length(config, seq_len))
    row |= _zeros(("encoder_inputs", "encoder_positions", "encoder_segment_ids"), seq_len)
  else:
    row = _zeros(names, seq_len)
  if "classification" in config.task:
    row["token_types"] = np.zeros(seq_len, np.int32)
  if config.task == "classification":
    row["targets"] = np.zeros((), np.int32)
  row["loss_weights"] = np.zeros(row["targets"].shape, np.float32)
  return row


def _zeros(names: tuple[str, ...], length: int) -> Row:
  return {name: np.zeros(length, np.int32) for name in names}


def target_length(config: DataConfig, seq_len: int) -> int:
  """Positions of the decoder where the encoder has `seq_len`."""
  noise = config.corruption
  if config.task == "span_corruption":
    tokens = corruption.tokens_that_fill(seq_len, noise.rate, noise.mean_span)
    return corruption.span_lengths(tokens, noise.rate, noise.mean_span)[1]
  return (config.task == "pairs" and config.target_len) or seq_len


class Special(NamedTuple):
  """Ids that a task puts into rows."""

  start: Ids  # BOS, or nothing where the tokenizer has none
  eos: int
  decoder_start: int
  mask: int
  sentinel: int

  def framed(self, tokens: Ids) -> Ids:
    """Start, tokens, EOS."""
    return np.concatenate([self.start, tokens, [self.eos]])

  @property
  def frame(self) -> int:
    """How many tokens `framed` adds."""
    return len(self.start) + 1


@dataclasses.dataclass(frozen=True)
class TextTask:
  """Each token is predicted from those before it."""

  empty: Row

  def plan(self, counts, packing, seed):
    return make_plan(packing, counts, len(self.empty["inputs"]), seed, 1)

  def row(self, pieces, documents, rng):
    row = copy(self.empty)
    for segment, (document, start, size) in enumerate(pieces, 1):
      put_example(row, segment, documents.framed(document, start, start + size + 1), 1)
    return row


@dataclasses.dataclass(frozen=True)
class MaskingTask:
  """Masked words are predicted from all others; a document stands between its start token and EOS."""

  empty: Row
  special: Special
  words: Words
  config: CorruptionConfig

  def plan(self, counts, packing, seed):
    return make_plan(packing, counts, len(self.empty["inputs"]), seed, 2)

  def row(self, pieces, documents, rng):
    row = copy(self.empty)
    words, first = np.full(len(row["inputs"]), -1), 0
    for segment, (document, start, size) in enumerate(pieces, 1):
      at = put(row, "", segment, documents.framed(document, start, start + size))
      words[at] = self.words.number(row["inputs"][at], self.config.whole_words)
      words[at] = np.where(words[at] < 0, -1, words[at] + first)
      first += size
    row["targets"] = row["inputs"]
    row["inputs"], chosen = corruption.mask_words(
      row["targets"],
      words,
      rng,
      rate=self.config.rate,
      mask_id=self.special.mask,
      random_ids=np.flatnonzero(self.words.ordinary),
    )
    row["inputs"] = row["inputs"].astype(np.int32)
    row["loss_weights"] = chosen.astype(np.float32)
    return row


@dataclasses.dataclass(frozen=True)
class EncoderDecoderTask:
  """Rows with two sides; a segment is a pair of what the encoder reads and what the decoder writes."""

  empty: Row
  special: Special

  @property
  def capacity(self) -> tuple[int, int]:
    """Positions of the encoder and of the decoder."""
    return len(self.empty["encoder_inputs"]), len(self.empty["inputs"])

  def pair(self, piece: Piece, documents: TokenDocuments, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """What is read and what is written, each with its special tokens."""
    raise NotImplementedError

  def row(self, pieces, documents, rng):
    row = copy(self.empty)
    for segment, piece in enumerate(pieces, 1):
      source, target = self.pair(piece, documents, rng)
      put(row, "encoder_", segment, source)
      put_example(row, segment, np.concatenate([[self.special.decoder_start], target]), 1)
    return row


@dataclasses.dataclass(frozen=True)
class SpanCorruptionTask(EncoderDecoderTask):
  """T5: the decoder writes the spans that sentinels stand for; a piece as long as can be fills both sides."""

  config: CorruptionConfig

  def plan(self, counts, packing, seed):
    rate, mean_span = self.config.rate, self.config.mean_span
    most = corruption.tokens_that_fill(self.capacity[0], rate, mean_span)
    pieces = cut_documents(counts, order_of(counts, seed), most)
    lengths = np.array([(0, 0)] + [corruption.span_lengths(n, rate, mean_span) for n in range(1, most + 1)])
    return fit_pieces(pieces, lengths[pieces[2]], self.capacity, packing)

  def pair(self, piece, documents, rng):
    tokens = text_of(piece, documents)
    noise = corruption.draw_spans(len(tokens), rng, self.config.rate, self.config.mean_span)
    sides = corruption.corrupt_spans(tokens, noise, self.special.sentinel)
    return tuple(np.append(side, self.special.eos) for side in sides)


@dataclasses.dataclass(frozen=True)
class DenoisingTask(EncoderDecoderTask):
  """BART: the decoder writes the text that the encoder reads corrupted."""

  config: CorruptionConfig
  words: Words

  def plan(self, counts, packing, seed):
    pieces = cut_documents(counts, order_of(counts, seed), self.capacity[0] - self.special.frame)
    costs = np.stack([pieces[2] + self.special.frame, pieces[2] + 1], axis=1)
    return fit_pieces(pieces, costs, self.capacity, packing)

  def pair(self, piece, documents, rng):
    c, original = self.config, text_of(piece, documents)
    tokens = original
    if c.permute_sentences:
      tokens = corruption.permute_sentences(tokens, self.words.ends_sentence[tokens], rng)
    if c.noise == "infill":
      tokens = corruption.infill(tokens, rng, rate=c.rate, mask_id=self.special.mask, mean_span=c.mean_span)
    elif c.noise == "mask":
      tokens = corruption.mask_tokens(tokens, rng, rate=c.rate, mask_id=self.special.mask)
    else:
      tokens = corruption.delete_tokens(tokens, rng, rate=c.rate)
    return self.special.framed(tokens), np.append(original, self.special.eos)


@dataclasses.dataclass(frozen=True)
class PairsTask(EncoderDecoderTask):
  """Examples (source, target); what does not fit is cut off, and EOS stays."""

  def plan(self, counts, packing, seed):
    order = order_of(counts, seed)
    wanted = counts + [self.special.frame, 1]
    costs = np.minimum(wanted, self.capacity)
    plan = fit_pieces(whole(order), costs[order], self.capacity, packing)
    return dataclasses.replace(plan, dropped_tokens=int((wanted - costs).sum()))

  def pair(self, piece, documents, rng):
    source, target = documents.parts(piece.document)
    source, target = source[: self.capacity[0] - self.special.frame], target[: self.capacity[1] - 1]
    return self.special.framed(source), np.append(target, self.special.eos)


@dataclasses.dataclass(frozen=True)
class ClassificationTask:
  """One example a row: BOS, text, EOS and, where there is a second text, that and another EOS.

  Of texts that do not fit the longer one is cut first. `targets` is the label of the text [], or of each token [T].
  """

  empty: Row
  special: Special

  def plan(self, counts, packing, seed):
    order = order_of(counts, seed)
    return TablePlan(*whole(order), np.arange(len(order) + 1))

  def row(self, pieces, documents, rng):
    row, (T,) = copy(self.empty), self.empty["inputs"].shape
    text, second, labels = documents.parts(pieces[0].document)
    room = T - self.special.frame - (len(second) > 0)
    second = second[: max(room - len(text), room // 2)]
    text = text[: room - len(second)]
    first = self.special.framed(text)
    both = np.concatenate([first, second, [self.special.eos]]) if len(second) else first
    put(row, "", 1, both)
    row["token_types"][len(first) : len(both)] = 1
    if row["targets"].ndim:
      labels = labels[: len(text)]
      at = slice(len(self.special.start), len(self.special.start) + len(labels))
      row["targets"][at], row["loss_weights"][at] = np.maximum(labels, 0), labels != IGNORED
    else:
      row["targets"], row["loss_weights"] = np.int32(labels[0]), np.float32(1)
    return row


Truncation = Literal["drop", "left", "right"]


@dataclasses.dataclass(frozen=True)
class ChatTask:
  """Conversations of which some tokens are trained; each is a segment of its own and stays whole, or is cut once."""

  empty: Row
  truncation: Truncation

  def plan(self, counts, packing, seed):
    before, trained, behind, _ = counts.T
    T = len(self.empty["inputs"])
    plan = _whole_or_cut(
      before + trained + behind - 1, before - 1, before + trained - 2, T, self.truncation, order_of(counts, seed)
    )
    fitted = fit_pieces((plan.documents, plan.starts, plan.sizes), plan.sizes[:, None], (T,), packing)
    return dataclasses.replace(fitted, **plan.lost)

  def row(self, pieces, documents, rng):
    row = copy(self.empty)
    for segment, piece in enumerate(pieces, 1):
      *ids, runs = documents.parts(piece.document)
      put_piece(row, segment, piece, np.concatenate(ids), runs)
    return row


@dataclasses.dataclass(frozen=True)
class PreferenceTask:
  """A chosen and a rejected answer, one pair a row; both sides are cut at the same place."""

  empty: Row
  truncation: Truncation

  def plan(self, counts, packing, seed):
    prompt, shared, chosen, rejected, *_ = counts.T
    # What must stay: cut right, where answers begin to differ; cut left, all that is trained.
    return _whole_or_cut(
      prompt + shared + np.maximum(chosen, rejected) - 1,
      prompt + shared - 1,
      prompt - 1,
      len(self.empty["chosen"]["inputs"]),
      self.truncation,
      order_of(counts, seed),
    )

  def row(self, pieces, documents, rng):
    rows = {side: copy(row) for side, row in self.empty.items()}
    for segment, piece in enumerate(pieces, 1):
      prompt, shared, *rest = documents.parts(piece.document)
      for row, ids, runs in zip(rows.values(), rest[:2], rest[2:]):
        put_piece(row, segment, piece, np.concatenate([prompt, shared, ids]), runs)
    return rows


def _whole_or_cut(positions: Ids, first: Ids, last: Ids, seq_len: int, truncation: Truncation, order: Ids) -> TablePlan:
  """One example a row, in this order, without those that are too long, or would lose what they are for.

  Args:
    positions: how many each fills.
    first, last: the one that must stay where the right is cut off, and where the left is.
  """
  over = np.maximum(positions - seq_len, 0)
  keep = {"drop": over == 0, "right": first < seq_len, "left": last >= over}[truncation]
  kept = order[keep[order]]
  if len(order) and not len(kept):
    raise DataError(
      f"each of {len(order)} examples is over training.seq_len {seq_len}, and data.truncation {truncation!r} leaves "
      f"nothing to learn of it; the shortest needs {positions[order].min()}"
    )
  sizes = np.minimum(positions, seq_len)[kept]
  return TablePlan(
    kept,
    over[kept] if truncation == "left" else np.zeros_like(kept),
    sizes,
    np.arange(len(kept) + 1),
    dropped_tokens=int(positions[order].sum() - sizes.sum()),
    dropped_documents=len(order) - len(kept),
    cut_documents=int((over[kept] > 0).sum()),
  )


_ENCODER_DECODER = ("span_corruption", "denoising", "pairs")


def make_task(config: DataConfig, seq_len: int, prepared: Prepared, decoder_start_id: int = 0) -> Task:
  """The task that `config` asks for.

  Raises DataError when it needs a mask or sentinel token that neither the tokenizer nor the config has.
  """
  empty = empty_row(config, seq_len)
  if config.task == "text":
    return TextTask(empty)
  if config.task in CHAT:
    return (ChatTask if config.task == "chat" else PreferenceTask)(empty, config.truncation)
  tokenizer = prepared.tokenizer()
  special = _special(config, tokenizer, decoder_start_id, seq_len)
  match config.task:
    case "masking":
      return MaskingTask(empty, special, words_of(tokenizer), config.corruption)
    case "span_corruption":
      return SpanCorruptionTask(empty, special, config.corruption)
    case "denoising":
      return DenoisingTask(empty, special, config.corruption, words_of(tokenizer))
    case "pairs":
      return PairsTask(empty, special)
    case _:
      return ClassificationTask(empty, special)


def _special(config: DataConfig, tokenizer: Tokenizer, decoder_start_id: int, seq_len: int) -> Special:
  noise, mask, sentinel = config.corruption, config.corruption.mask_id, config.corruption.sentinel_id
  mask = tokenizer.mask_id if mask is None else mask
  sentinel = _first_sentinel(tokenizer) if sentinel is None else sentinel
  needed = {"masking": mask, "denoising": mask, "span_corruption": sentinel}
  if needed.get(config.task, 0) is None:
    name = "sentinel_id" if config.task == "span_corruption" else "mask_id"
    raise DataError(
      f"data.task {config.task!r} needs a token that the tokenizer of {config.dir} does not have: set "
      f"data.corruption.{name} to an id past its {tokenizer.vocab_size} tokens, and model.vocab_size above that"
    )
  if config.task == "span_corruption":
    assert sentinel is not None
    tokens = corruption.tokens_that_fill(seq_len, noise.rate, noise.mean_span)
    spans = corruption.span_counts(tokens, noise.rate, noise.mean_span)[1]
    if noise.sentinel_id is None and (there := _sentinels(tokenizer, sentinel, spans)) < spans:
      raise DataError(
        f"rows of {seq_len} tokens have up to {spans} noise spans, and the tokenizer has {there} sentinels: raise "
        f"data.corruption.mean_span to {math.ceil(noise.mean_span * spans / there) + 1}, lower training.seq_len, or "
        f"set data.corruption.sentinel_id to an id past the tokenizer's, {tokenizer.vocab_size + spans - 1}, and "
        "model.vocab_size above that"
      )
    if noise.sentinel_id is not None and noise.sentinel_id - spans + 1 < tokenizer.vocab_size:
      raise DataError(
        f"rows of {seq_len} tokens have up to {spans} noise spans, whose sentinels count down from "
        f"data.corruption.sentinel_id {noise.sentinel_id} into the tokenizer's {tokenizer.vocab_size} tokens; raise it "
        f"to at least {tokenizer.vocab_size + spans - 1}"
      )
  assert tokenizer.eos_id is not None  # prepare has refused tokenizers without one
  start = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int32)
  return Special(start, tokenizer.eos_id, decoder_start_id, mask or 0, sentinel or 0)


def _sentinels(tokenizer: Tokenizer, first: int, most: int) -> int:
  """How many of T5's sentinels count down from the first, up to `most`."""
  for number in range(most):
    ids = tokenizer.encode_prompt(f"<extra_id_{number}>", add_special=False)
    if ids.tolist() != [first - number]:
      return number
  return most


def _first_sentinel(tokenizer: Tokenizer) -> int | None:
  """T5's <extra_id_0>, where it is one token."""
  ids = tokenizer.encode_prompt("<extra_id_0>", add_special=False)
  return int(ids[0]) if len(ids) == 1 and int(ids[0]) in tokenizer.special_ids else None


def text_of(piece: Piece, documents: TokenDocuments) -> Ids:
  """The tokens of a piece of a text, without special ones."""
  return documents.framed(piece.document, 1 + piece.start, 1 + piece.start + piece.size)


def whole(order: Ids) -> Pieces:
  """Examples, which are never cut, as pieces."""
  return order, np.zeros_like(order), np.ones_like(order)


def put_example(row: Row, segment: int, ids: Ids, weights: np.ndarray | float) -> None:
  """Writes a segment in which each token but the first is predicted from those before it, with its weight."""
  at = put(row, "", segment, ids[:-1])
  row["targets"][at], row["loss_weights"][at] = ids[1:], weights


def put_piece(row: Row, segment: int, piece: Piece, ids: Ids, runs: Ids) -> None:
  """Writes the piece's positions of an example whose weights are `packed`."""
  at = slice(piece.start, piece.start + piece.size + 1)
  put_example(row, segment, ids[at], unpacked(runs)[at][1:])


def stacked(rows: Sequence[Row]) -> Row:
  """Rows of one form as a batch."""
  return {
    name: stacked([row[name] for row in rows]) if isinstance(entry, dict) else np.stack([row[name] for row in rows])
    for name, entry in rows[0].items()
  }


def copy(row: Row) -> Row:
  return {name: array.copy() for name, array in row.items()}


def put(row: Row, side: str, segment: int, ids: Ids) -> slice:
  """Writes a segment behind those that the side has already; returns where."""
  start = int((row[f"{side}segment_ids"] > 0).sum())
  at = slice(start, start + len(ids))
  row[f"{side}inputs"][at] = ids
  row[f"{side}positions"][at] = np.arange(len(ids))
  row[f"{side}segment_ids"][at] = segment
  return at
