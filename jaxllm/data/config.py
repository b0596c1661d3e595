"""Settings of the data room: where text comes from and how it becomes batches."""

import dataclasses
from typing import Literal

from jaxllm.base.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """One corpus of documents.

  kind: "text" (path is a glob or several joined by commas, one document a file), "jsonl", "parquet" (globs;
  one document a row, in `field`), "python" (globs; a row for each documented function, see
  `jaxllm.data.python_functions`), "tfds" (path is a TFDS name), "huggingface" (a `datasets` directory or hub
  name, "name:config" where it has configs).
  """

  kind: Literal["text", "jsonl", "parquet", "python", "tfds", "huggingface"] = "text"
  path: str = ""
  name: str = ""  # what reports call it; "": made from the path
  split: str = "train"  # tfds and huggingface
  field: str = "text"
  fields: tuple[str, ...] = ()  # of an example, in the task's order (`jaxllm.data.examples`); (): the usual names
  weight: float = 1.0  # share of the mixture, relative to the other sources
  max_documents: int | None = None


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Load a tokenizer from `path` (a SentencePiece .model, a tokenizer.json, or a directory with either),
  or train one on the corpus when `path` is empty."""

  path: str = ""
  kind: Literal["sentencepiece_bpe", "sentencepiece_unigram"] = "sentencepiece_bpe"
  vocab_size: int = 4096
  train_bytes: int = 20_000_000  # of the corpus, sampled evenly over its documents


@dataclasses.dataclass(frozen=True)
class CorruptionConfig:
  """What a model learns to undo: data.task "masking", "span_corruption" or "denoising"."""

  rate: float = 0.15  # share of the tokens that are masked, or in noise spans
  mean_span: float = 3.0  # tokens in a noise span
  whole_words: bool = True  # masking
  noise: Literal["infill", "mask", "delete"] = "infill"  # denoising
  permute_sentences: bool = True  # denoising
  # Special ids. None: the tokenizer's own mask token, or its <extra_id_0>. Where it has none, give ids past its
  # vocabulary and a model.vocab_size above them. The first noise span takes sentinel_id, the next one less, …
  mask_id: int | None = None
  sentinel_id: int | None = None

  def __post_init__(self):
    if not 0 < self.rate < 1:
      raise ConfigError(f"data.corruption.rate is {self.rate}; it is a share between 0 and 1")
    if self.mean_span < 1:
      raise ConfigError(f"data.corruption.mean_span is {self.mean_span}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """From sources to batches; `jaxllm.prepare` fills `dir`, `jaxllm.train` reads it."""

  dir: str = "data/default"  # prepared shards, tokenizer and manifest live here
  sources: tuple[SourceConfig, ...] = ()
  tokenizer: TokenizerConfig = TokenizerConfig()
  heldout_fraction: float = 0.01  # of documents, chosen by a hash of the document's id
  max_heldout_bytes: int | None = None
  # How documents become rows (`jaxllm.data.tasks`). "text": to predict the next token. "masking": masked words.
  # "span_corruption" (T5), "denoising" (BART), "pairs" (source, target): for an encoder-decoder.
  # "classification", "token_classification": examples with labels.
  task: Literal[
    "text", "masking", "span_corruption", "denoising", "pairs", "classification", "token_classification"
  ] = "text"
  corruption: CorruptionConfig = CorruptionConfig()
  target_len: int = 0  # pairs: positions of the decoder, where training.seq_len is the encoder's; 0: as many
  labels: tuple[str, ...] = ()  # names of the classes, in order; (): the data has their numbers
  # "split": documents joined and cut; "first_fit"/"best_fit": whole documents packed; "none": one a row
  packing: Literal["split", "first_fit", "best_fit", "none"] = "split"
  shuffle: bool = True
  epochs: float | None = None  # stop after so many passes over the mixture; None: no limit
  workers: int = 0  # grain worker processes; 0 reads in the training process
  prefetch: int = 16  # batches read ahead

  def __post_init__(self):
    if self.task not in ("text", "masking") and self.packing == "split":
      raise ConfigError(
        f"data.packing 'split' cuts documents anywhere, which data.task {self.task!r} cannot use; choose "
        "'best_fit', 'first_fit' or 'none'"
      )
    if "classification" in self.task and self.packing != "none":
      raise ConfigError(f"data.task {self.task!r} has one example a row; set data.packing to 'none'")
