"""Settings of the data room: where text comes from and how it becomes batches."""

import dataclasses
import math
from typing import Any, Literal

from jaxllm.base.errors import ConfigError

# The standard names of instruction data's columns, and of the keys of a message.
COLUMNS = (
  "instruction", "input", "output", "system", "history", "conversations", "messages", "tools", "prompt", "completion",
  "chosen", "rejected", "text", "role", "content",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """One corpus of documents.

  kind: "text" (path is a glob or several joined by commas, one document a file), "jsonl", "json" (a list of objects),
  "parquet" (globs; one document a row, in `field`), "python" (globs; a row for each documented function, see
  `jaxllm.data.python_functions`), "tfds" (path is a TFDS name), "huggingface" (a `datasets` directory or hub
  name, "name:config" where it has configs). docs/preparing_data.md says more of all.
  """

  kind: Literal["text", "jsonl", "json", "parquet", "python", "tfds", "huggingface"] = "text"
  path: str = ""
  name: str = ""  # what reports call it; "": made from the path
  split: str = "train"  # tfds and huggingface
  field: str = "text"
  fields: tuple[str, ...] = ()  # of an example, in the task's order (`jaxllm.data.examples`); (): the usual names
  # Instruction data (`jaxllm.data.conversations`); "auto": by the names of the columns
  format: Literal["auto", "alpaca", "sharegpt", "openai", "prompt_completion", "text"] = "auto"
  columns: dict[str, str] = dataclasses.field(default_factory=dict)  # standard name -> name here: {"output": "answer"}
  weight: float = 1.0  # share of the mixture, relative to the other sources
  max_documents: int | None = None
  encoding: str = ""  # of the files' text; "": UTF-8, or what a byte order mark says
  on_null: Literal["error", "skip", "keep"] = "error"  # a field is null or missing: "keep" takes it for an empty text
  streaming: bool = False  # huggingface: read as it comes, without a copy on the disk

  def __post_init__(self):
    unknown = sorted(self.columns.keys() - set(COLUMNS))
    if unknown:
      raise ConfigError(f"a source's `columns` has the key {unknown[0]!r}; standard names are {', '.join(COLUMNS)}")
    if not 0 <= self.weight < math.inf:
      raise ConfigError(f"data source {self.path!r} has weight {self.weight}; it must be a number that is not negative")
    if self.max_documents is not None and self.max_documents < 1:
      raise ConfigError(f"data source {self.path!r} has max_documents {self.max_documents}; it must be at least 1")


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
class ChatConfig:
  """What of a conversation is trained: data.task "chat" and "preference" (`jaxllm.data.masks`)."""

  template: str = ""  # a Jinja file in place of the tokenizer's own chat template
  variables: dict[str, Any] = dataclasses.field(default_factory=dict)  # for the template: {"enable_thinking": False}
  # "assistant": what assistants say (of prompt and completion: the completion); "last": their last turn; "all": the
  # prompts too. Messages may have a weight of their own.
  train_on: Literal["assistant", "last", "all"] = "assistant"
  reasoning: Literal["train", "mask", "drop"] = "train"  # "mask": read, and not trained
  tool_calls: Literal["train", "mask"] = "train"  # of the turns that call tools
  require_bos: bool = True  # where the tokenizer begins texts with BOS, the template must too


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """From sources to batches; `jaxllm.prepare` fills `dir`, `jaxllm.train` reads it."""

  dir: str = "data/default"  # prepared shards, tokenizer and manifest live here
  sources: tuple[SourceConfig, ...] = ()
  tokenizer: TokenizerConfig = TokenizerConfig()
  # Of documents, chosen by a hash of the document's id; of instruction data of prompts, so that what is asked in a
  # held-out row is asked in no other.
  heldout_fraction: float = 0.01
  max_heldout_bytes: int | None = None
  # How documents become rows (`jaxllm.data.tasks`). "text": to predict the next token. "masking": masked words.
  # "span_corruption" (T5), "denoising" (BART), "pairs" (source, target): for an encoder-decoder.
  # "classification", "token_classification": examples with labels. "chat": conversations. "preference": a chosen and a
  # rejected answer.
  task: Literal[
    "text",
    "masking",
    "span_corruption",
    "denoising",
    "pairs",
    "classification",
    "token_classification",
    "chat",
    "preference",
  ] = "text"
  chat: ChatConfig = ChatConfig()
  truncation: Literal["drop", "left", "right"] = "drop"  # where chat is longer than training.seq_len: what goes
  on_bad_row: Literal["error", "skip"] = "error"  # skipped rows are counted and listed
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
    if not self.dir.strip():
      raise ConfigError("data.dir is empty; name the folder of the prepared data, data/mine say")
    if ("classification" in self.task or self.task == "preference") and self.packing != "none":
      raise ConfigError(f"data.task {self.task!r} has one example a row; set data.packing to 'none'")
    if self.task not in ("text", "masking") and self.packing == "split":
      raise ConfigError(
        f"data.packing 'split' cuts documents anywhere, which data.task {self.task!r} cannot use; choose "
        "'best_fit', 'first_fit' or 'none'"
      )
    if self.task == "preference" and self.chat.train_on == "all":
      raise ConfigError("data.chat.train_on 'all' has no meaning for data.task 'preference', which compares answers")
