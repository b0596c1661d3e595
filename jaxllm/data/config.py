"""Settings of the data room: where text comes from and how it becomes batches."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """One corpus of documents.

  kind: "text" (path is a glob or several joined by commas, one document a file), "jsonl", "parquet" (globs;
  one document a row, in `field`), "tfds" (path is a TFDS name), "huggingface" (a `datasets` directory or hub
  name, "name:config" where it has configs).
  """

  kind: Literal["text", "jsonl", "parquet", "tfds", "huggingface"] = "text"
  path: str = ""
  name: str = ""  # what reports call it; "": made from the path
  split: str = "train"  # tfds and huggingface
  field: str = "text"
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
class DataConfig:
  """From sources to batches; `jaxllm.prepare` fills `dir`, `jaxllm.train` reads it."""

  dir: str = "data/default"  # prepared shards, tokenizer and manifest live here
  sources: tuple[SourceConfig, ...] = ()
  tokenizer: TokenizerConfig = TokenizerConfig()
  heldout_fraction: float = 0.01  # of documents, chosen by a hash of the document's id
  max_heldout_bytes: int | None = None
  # "split": documents joined and cut; "first_fit"/"best_fit": whole documents packed; "none": one a row
  packing: Literal["split", "first_fit", "best_fit", "none"] = "split"
  shuffle: bool = True
  epochs: float | None = None  # stop after so many passes over the mixture; None: no limit
  workers: int = 0  # grain worker processes; 0 reads in the training process
  prefetch: int = 16  # batches read ahead
