"""The files of directories of models and of runs: config.json, generation_config.json, a tokenizer's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Required, TypedDict

from jaxllm.base.errors import CheckpointError
from jaxllm.base.strangers import Count, Real, Size, Whole, declared, read_json
from jaxllm.data.tokenizers import Tokenizer, find_tokenizer, load_tokenizer

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
CHECKPOINTS = "checkpoints"  # of a run
TOKENIZER = "tokenizer"  # of a run
# What is read where it is there, so that a directory with a manifest must not have one that the manifest has not
READ_IF_THERE = (
  *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "*.model", "*.jinja"),
  *("vocab.json", "vocab.txt", "merges.txt", "additional_chat_templates/*.jinja", GENERATION_FILE),
)
# Of a run that does not train all weights: what its checkpoints leave out, and, if it began with fresh ones, where
START_FILE, START = "start.json", "start"
ADAPTER = "adapter"  # what a run with adapters has trained, in PEFT's form
START_ADAPTER = "start_adapter"  # of a run whose adapters began with singular values: these, not scaled


def write_json(path: Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Generation(TypedDict, total=False):
  """Keys of generation_config.json whose types are known; the rest is checked where it is used, if it is."""

  eos_token_id: Whole | list[Whole] | None
  bos_token_id: Whole | None
  pad_token_id: Whole | None
  decoder_start_token_id: Whole | None
  do_sample: bool | None
  temperature: Real | None
  top_k: Whole | None
  top_p: Real | None
  min_p: Real | None
  typical_p: Real | None
  top_h: Real | None
  epsilon_cutoff: Real | None
  eta_cutoff: Real | None
  repetition_penalty: Real | None
  no_repeat_ngram_size: Whole | None
  encoder_repetition_penalty: Real | None
  encoder_no_repeat_ngram_size: Whole | None
  exponential_decay_length_penalty: list[Real] | None
  renormalize_logits: bool | None
  max_length: Whole | None
  min_length: Whole | None
  max_new_tokens: Whole | None
  min_new_tokens: Whole | None
  num_beams: Whole | None
  num_return_sequences: Whole | None
  length_penalty: Real | None
  forced_bos_token_id: Count | list[Count] | None
  forced_eos_token_id: Count | list[Count] | None
  suppress_tokens: list[Count] | None
  begin_suppress_tokens: list[Count] | None
  bad_words_ids: list[list[Count]] | None
  stop_strings: str | list[str] | None


# Further ones of transformers' that an old config.json may have, as it has those above.
MORE_SETTINGS = (
  *("early_stopping", "sequence_bias", "cache_implementation", "assistant_ensemble_weight", "constraints"),
  *("diversity_penalty", "dola_layers", "force_words_ids", "guidance_scale", "is_assistant", "max_time"),
  *("num_beam_groups", "penalty_alpha", "remove_invalid_values", "token_healing", "watermarking_config"),
)


def settings_in_config(config: Mapping[str, Any]) -> dict[str, Any]:
  """What a Hugging Face config.json says of generation, where there is no generation_config.json: files from before
  there was one say it there, or in what they say of the decoder. `task_specific_params` are not read, as in
  transformers 5.
  """
  names = (*Generation.__annotations__, *MORE_SETTINGS)
  inner = next(
    (one for name in ("decoder", "generator", "text_config") if isinstance(one := config.get(name), dict)), {}
  )
  found = {name: part[name] for name in names for part in (inner, config) if part.get(name) is not None}
  if config.get("force_bos_token_to_be_generated") and "bos_token_id" in found:
    found["forced_bos_token_id"] = found["bos_token_id"]
  return found


def as_transformers(generation: Mapping[str, Any], encoder_decoder: bool) -> dict[str, Any]:
  """Settings of a Hugging Face directory with what transformers takes where they are silent: nothing is drawn, and a
  decoder begins with the token that begins texts."""
  usual = {"do_sample": False} | ({"decoder_start_token_id": generation.get("bos_token_id")} if encoder_decoder else {})
  said = {name for name, value in generation.items() if value is not None}
  return {**generation} | {name: value for name, value in usual.items() if name not in said and value is not None}


def generation_settings(values: Mapping[str, Any], what: Path) -> dict[str, Any]:
  """The content of a generation_config.json, its known keys by their types.

  A token id below 0 means none, as in transformers.

  Raises:
    ConfigError: a value of another type.
  """
  known = declared(Generation, values, str(what))
  for name in ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"):
    ids = known.get(name)
    if isinstance(ids, list):
      known[name] = [i for i in ids if i >= 0]
    elif ids is not None and ids < 0:
      known[name] = None
  return {**values, **known}


class Source(TypedDict, total=False):
  """What a Hugging Face config.json says of a model that no ModelConfig has a place for, and exports say again."""

  model_type: str
  id2label: dict[str, Any]
  label2id: dict[str, Any]
  problem_type: str | None
  bos_token_id: Whole | list[Whole] | None
  eos_token_id: Whole | list[Whole] | None
  pad_token_id: Whole | None


def source_of(config: Mapping[str, Any], what: Path) -> dict[str, Any]:
  """A config.json's `Source`: of Hugging Face, or of a model directory, which has it as a group.

  Raises:
    ConfigError: a value is of another type.
  """
  said = declared(Source, config.get("source", config), str(what))
  return {key: value for key, value in said.items() if value is not None}


class StartRecord(TypedDict, total=False):
  """start.json of a run: what its checkpoints leave out, and where that is."""

  path: Required[str]  # of a model; `START`: beside it
  step: Count | None
  adapter: str | None
  digest: str
  adapter_digest: str
  scales: dict[str, Real | list[Real] | list[list[Real]]]
  quantize: str | None
  group_size: Size | None
  double_quantize: bool


def read_start(directory: Path) -> dict[str, Any]:
  """A run's start.json.

  Raises:
    CheckpointError: it cannot be read, or a value in it is of another type.
  """
  file = directory / START_FILE
  usual = dict.fromkeys(("step", "adapter", "quantize", "group_size")) | {"scales": {}, "double_quantize": False}
  return usual | declared(StartRecord, read_json(file), str(file), CheckpointError)


def read_generation_config(directory: Path) -> dict[str, Any]:
  """generation_config.json, {} where there is none.

  Raises:
    CheckpointError: it cannot be read. ConfigError: a value in it is of a wrong type.
  """
  file = directory / GENERATION_FILE
  return generation_settings(read_json(file), file) if file.is_file() else {}


def read_tokenizer(directory: Path) -> Tokenizer | None:
  """The tokenizer in a directory; None where there are no files of one (a model of bare token ids)."""
  return None if find_tokenizer(directory) is None else load_tokenizer(directory)
