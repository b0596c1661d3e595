"""Rows of token ids as a person reads them: decoded, with what is trained in colour or in brackets."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxllm.data.config import DataConfig
from jaxllm.data.examples import CHAT
from jaxllm.data.manifest import Prepared
from jaxllm.data.tasks import Row, make_task
from jaxllm.data.tokenizers import Tokenizer

_MOST = 1200  # characters of an example at the start of a run, of which the middle goes
_COLOUR, _PLAIN = ("\x1b[1;32m", "\x1b[0m"), ("[[", "]]")


def marked_text(
  tokenizer: Tokenizer, ids: Int[np.ndarray, " tokens"], weights: Float[np.ndarray, " tokens"], colour: bool = False
) -> str:
  """The text of tokens, special ones as they are spelled, around those with a weight green or [[brackets]].

  A weight that is not 1 stands before its text.
  """
  begin, end = _COLOUR if colour else _PLAIN
  parts = []
  for start, stop in _runs(weights):
    text, weight = _spelled(tokenizer, ids[start:stop]), float(weights[start])
    parts.append(f"{begin}{'' if weight == 1 else f'{weight:g}: '}{text}{end}" if weight else text)
  return "".join(parts)


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
  """Where equal neighbours begin and end."""
  edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
  return [(start, stop) for start, stop in zip(edges, edges[1:]) if start < stop]


def _spelled(tokenizer: Tokenizer, ids: np.ndarray) -> str:
  special = np.isin(ids, sorted(tokenizer.special_ids))
  texts = []
  for start, stop in _runs(special):
    run = ids[start:stop].tolist()
    texts.append("".join(map(tokenizer.token_text, run)) if special[start] else tokenizer.decode(run))
  return "".join(texts)


def marked_row(tokenizer: Tokenizer, row: Row, colour: bool = False) -> str:
  """The segments of a row, one after another, and how much of it is trained; of a preference both sides."""
  if "chosen" in row:
    return "\n".join(f"{side}: {marked_row(tokenizer, one, colour)}" for side, one in row.items())
  segments, weights = row["segment_ids"], row["loss_weights"]
  texts = []
  for segment in range(1, int(segments.max(initial=0)) + 1):
    at = np.flatnonzero(segments == segment)
    ids, trained = row["inputs"][at], np.broadcast_to(weights, segments.shape)[at]
    if row["targets"].ndim and (row["targets"][at[:-1]] == ids[1:]).all():  # targets are the next tokens
      ids, trained = np.append(ids, row["targets"][at[-1]]), np.append(0, trained)
    texts.append(marked_text(tokenizer, ids, trained, colour))
  counts = f"{int((weights > 0).sum())} of {(segments > 0).sum()} targets trained, {(segments == 0).sum()} of padding"
  return "\n".join([*texts, f"({counts})"])


def first_row(tokenizer: Tokenizer, batch: Row, colour: bool = False) -> str:
  """`marked_row` of a batch's first."""

  def first(entry: Any) -> Any:
    return {name: first(part) for name, part in entry.items()} if isinstance(entry, dict) else entry[0]

  return marked_row(tokenizer, first(batch), colour)


def example_rows(config: DataConfig, prepared: Prepared, seq_len: int) -> list[tuple[str, str]]:
  """(name, value) of instruction data: what training.seq_len cuts of each source, and the first example."""
  if config.task not in CHAT:
    return []
  rows, example = [], ""
  task = make_task(config, seq_len, prepared)
  for source in prepared.sources:
    plan = task.plan(prepared.token_counts(source, "train"), "none", None)
    if plan.dropped_documents or plan.cut_documents:
      counts = f"{plan.dropped_documents:,} of {source.train.documents:,} left out, {plan.cut_documents:,} cut"
      rows.append(("truncation", f"{source.name}: {counts} (data.truncation {config.truncation!r} at {seq_len})"))
    if plan.num_rows and not example:
      row = task.row(plan.pieces(0, 0), prepared.documents(source, "train"), np.random.default_rng(0))
      example = marked_row(prepared.tokenizer(), row)
  if len(example) > _MOST:
    example = f"{example[: _MOST // 2]} … {example[-_MOST // 2 :]}"
  return [*rows, ("example", example)] if example else rows
