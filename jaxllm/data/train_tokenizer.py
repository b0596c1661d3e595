"""Trains a lossless SentencePiece tokenizer on a sample of a corpus."""

import concurrent.futures
import io
import re
import threading
from collections.abc import Iterable, Iterator

from jaxllm.base.errors import DataError
from jaxllm.data.config import TokenizerConfig
from jaxllm.data.tokenizers import SentencePieceTokenizer, Tokenizer

_CHUNK_CHARACTERS = 2048
_BYTE_PIECES = 256
_SPECIAL_PIECES = 4  # pad, bos, eos, unk


def train_sentencepiece(
  documents: Iterable[bytes], config: TokenizerConfig, total_bytes: int | None = None
) -> Tokenizer:
  """Trains on about `config.train_bytes` of the documents, spread evenly over all `total_bytes` of them.

  Whitespace is kept as it is and runs of it may become pieces (which code needs); digits are single pieces;
  characters that the vocabulary lacks, and bytes that are not UTF-8, become byte pieces. Ids 0 to 3 are pad,
  bos, eos and unk. `total_bytes` None trains on everything.

  Raises DataError when the text cannot fill, or does not fit, `config.vocab_size` pieces.
  """
  import sentencepiece

  if config.vocab_size < _BYTE_PIECES + _SPECIAL_PIECES + 1:
    raise DataError(
      f"data.tokenizer.vocab_size {config.vocab_size} is too small: the {_BYTE_PIECES} byte pieces, "
      f"{_SPECIAL_PIECES} special ones and at least one more need {_BYTE_PIECES + _SPECIAL_PIECES + 1}"
    )
  share = 1.0 if total_bytes is None else min(1.0, config.train_bytes / max(total_bytes, 1))
  model = io.BytesIO()
  sample = list(_sample(documents, share))  # what goes wrong with the documents is no failure of SentencePiece's
  trained: concurrent.futures.Future[None] = concurrent.futures.Future()

  def train() -> None:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(sample),
      model_writer=model,
      model_type=config.kind.removeprefix("sentencepiece_"),
      vocab_size=config.vocab_size,
      byte_fallback=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      split_digits=True,
      max_sentence_length=8 * _CHUNK_CHARACTERS,
      pad_id=0,
      bos_id=1,
      eos_id=2,
      unk_id=3,
      num_threads=4,  # fixed: how the text is shared out rounds the unigram's sums
      minloglevel=3,
    )

  def run() -> None:
    try:
      train()
      trained.set_result(None)
    except Exception as error:
      trained.set_exception(error)

  # In a thread, for which this one waits: signals such as Ctrl-C are seen while SentencePiece computes.
  threading.Thread(target=run, daemon=True).start()
  try:
    trained.result()
  except (RuntimeError, OSError) as error:
    raise _explain(error, config.vocab_size) from error
  return SentencePieceTokenizer(model.getvalue())


def _sample(documents: Iterable[bytes], share: float) -> Iterator[str]:
  """Chunks of whole lines, every 1/share-th one."""
  due = 0.0
  for document in documents:
    for chunk in _chunks(document.decode("utf-8", "ignore").replace("\0", "")):
      due += share
      if due >= 1.0 - 1e-9:
        due -= 1.0
        yield chunk


def _chunks(text: str) -> Iterator[str]:
  """SentencePiece drops overlong sentences, so documents are cut, at line ends where there are any."""
  start = 0
  while start < len(text):
    end = start + _CHUNK_CHARACTERS
    line_end = text.rfind("\n", start, end) + 1
    if end < len(text) and line_end > start:
      end = line_end
    yield text[start:end]
    start = end


def _explain(error: Exception, vocab_size: int) -> DataError:
  """Turns SentencePiece's complaint into what to do."""
  message = " ".join(str(error).split())
  largest = re.search(r"value <= (\d+)", message)
  smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
  if largest:
    return DataError(
      f"the corpus is too small for data.tokenizer.vocab_size {vocab_size}; set it to at most {largest[1]}"
    )
  if smallest:
    return DataError(
      f"data.tokenizer.vocab_size {vocab_size} has no room for the corpus' characters; set it to at least "
      f"{int(smallest[1]) + 1}"
    )
  if "sentences_.empty()" in message:
    return DataError("the corpus has no UTF-8 text to train a tokenizer on; give one as data.tokenizer.path")
  return DataError(f"SentencePiece could not train a tokenizer of vocab_size {vocab_size}: {message}")
