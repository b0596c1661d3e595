"""A model's generation_config.json as its default sampling settings.

Every name that transformers 5 writes there stands in one of the tables below: a setting of ours, a fact that something
else reads, a matter of how it computes and not of what is drawn, or one that is not honoured, which is said.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxllm.base.errors import ConfigError, shown
from jaxllm.inference.params import SamplingParams

# Theirs to ours, where a value means the same.
SETTINGS = {
  name: name
  for name in (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
    *("sequence_bias", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "max_length", "min_length"),
    *("forced_bos_token_id", "forced_eos_token_id"),
    *("num_beams", "length_penalty", "early_stopping", "renormalize_logits", "exponential_decay_length_penalty"),
  )
} | {
  "max_new_tokens": "max_tokens",
  "min_new_tokens": "min_tokens",
  "num_return_sequences": "n",
  "stop_strings": "stop",
}
# Settings that mean something else together with others: see `default_settings`.
READ_HERE = frozenset({"do_sample", "cache_implementation"})
# What other parts of the program read.
READ_ELSEWHERE = frozenset({"eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"})
# How a text is computed, or what transformers' `generate` returns beside it; the text is the same.
CHANGES_NO_TEXT = frozenset(
  ("use_cache", "cache_config", "max_cache_len", "use_mtp", "low_memory", "prefill_chunk_size")
  + ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate")
  + ("compile_config", "disable_compile", "continuous_batching_config", "transformers_version", "_from_model_config")
  + ("_commit_hash", "num_assistant_tokens", "num_assistant_tokens_schedule", "speculation_type")
  + ("assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit")
  + ("assistant_lookbehind", "target_lookbehind", "add_bos_token", "add_eos_token")
)
# What would change the text and does not here, and the values with which it changes nothing there either.
NOT_HONOURED: dict[str, tuple[Any, ...]] = {
  "assistant_ensemble_weight": (0,),
  "constraints": (),
  "diversity_penalty": (0,),
  "dola_layers": (),
  "force_words_ids": (),
  "guidance_scale": (1,),
  "is_assistant": (),
  "max_time": (),
  "num_beam_groups": (1,),
  "penalty_alpha": (0,),
  "remove_invalid_values": (),
  "token_healing": (),
  "watermarking_config": (),
}
LEAST = 1e-30  # of a share of probability
NOTHING: tuple[Any, ...] = (None, False, [], {})
# Who asks for one of these wants tokens to be drawn, whatever the file says.
DRAWS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "best_of")


def default_settings(generation: Mapping[str, Any], architecture: str = "decoder") -> tuple[dict[str, Any], list[str]]:
  """Fields of SamplingParams that a generation_config.json sets, and a line on each setting that is not honoured.

  `do_sample` false means temperature 0. Where it is absent, tokens are drawn (vLLM does, transformers would not: of its
  directories it is set when they are opened). Names of SamplingParams that transformers does not have stand for
  themselves.

  Args:
    architecture: of the model, see `ModelConfig`.
  """
  known = {field.name for field in dataclasses.fields(SamplingParams)} - SETTINGS.keys() - READ_HERE
  settings: dict[str, Any] = {}
  said: list[str] = []
  for name, value in generation.items():
    if value is None or name in READ_ELSEWHERE or name in CHANGES_NO_TEXT or name in READ_HERE:
      continue
    if name in SETTINGS:
      settings[SETTINGS[name]] = value
    elif name in known:
      settings[name] = value
    elif name in NOT_HONOURED:
      if not (value in NOTHING or value in NOT_HONOURED[name]):
        said.append(f"{name} = {shown(value)} is not honoured")
    else:
      said.append(f"{shown(name)[1:-1]} = {shown(value)} is not known")

  if generation.get("do_sample") is False:
    settings["temperature"] = 0.0
  if settings.get("top_p") == 0:  # there the likeliest token alone
    settings["top_p"] = LEAST
  if generation.get("cache_implementation") == "quantized":
    said.append("cache_implementation = 'quantized' is not honoured: keys and values are kept whole")
  for least, most in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
    low, high = generation.get(least), generation.get(most)
    if isinstance(low, int) and isinstance(high, int) and low > high:
      said.append(f"{least} = {low} is over {most} = {high}, where texts end")
  if generation.get("do_sample") and settings.get("num_beams", 1) > 1:
    said.append("do_sample = True is not honoured: beam search draws nothing")
  if architecture == "decoder" and settings.pop("forced_bos_token_id", None) is not None:
    forced = shown(generation["forced_bos_token_id"])
    said.append(f"forced_bos_token_id = {forced} is not honoured: a decoder's text begins with its prompt")
  ends = generation.get("eos_token_id")
  ends = ends if isinstance(ends, list) else [ends]
  if settings.get("bad_words_ids"):  # transformers never bans an end
    settings["bad_words_ids"] = [ids for ids in settings["bad_words_ids"] if not (len(ids) == 1 and ids[0] in ends)]
  if "max_tokens" in settings:  # of two names for a length, the one without the prompt counts
    settings.pop("max_length", None)
  elif "max_length" in settings:
    settings["max_tokens"] = None
  if "min_tokens" in settings:
    settings.pop("min_length", None)
  return settings, said


def default_sampling(generation: Mapping[str, Any], architecture: str = "decoder", **settings: Any) -> SamplingParams:
  """A model's own SamplingParams, with these settings in place of its.

  Where the file says that nothing is drawn, it is nevertheless with settings that only a draw can heed. The file's
  least length gives way to the greatest one.

  Raises:
    ConfigError: there is no such setting, or its value is impossible; of one from the file it says so.
  """
  known = [field.name for field in dataclasses.fields(SamplingParams)]
  if unknown := sorted(settings.keys() - set(known)):
    raise ConfigError(f"no sampling setting {unknown[0]!r}; there are {', '.join(sorted(known))}")
  asks = any(settings.get(name) is not None for name in DRAWS) or settings.get("n", 1) > 1
  if asks and generation.get("do_sample") is False:
    generation = {name: value for name, value in generation.items() if name != "do_sample"}
  own = default_settings(generation, architecture)[0]
  for name, other in (("max_tokens", "max_length"), ("min_tokens", "min_length")):
    if name in settings:
      own.pop(other, None)
  if settings.get("max_length") is not None:
    own.setdefault("max_tokens", None)
  if settings.get("structured_outputs") is not None:  # a grammar says how a text begins and ends
    own.pop("forced_bos_token_id", None)
    own.pop("forced_eos_token_id", None)
  for least, most in (("min_tokens", "max_tokens"), ("min_length", "max_length")):
    limit = (own | settings).get(most, getattr(SamplingParams, most))
    if isinstance(own.get(least), int) and isinstance(limit, int):
      own[least] = min(own[least], limit)
  try:
    SamplingParams(**own)
  except ConfigError as error:
    raise ConfigError(f"the model's generation_config.json: {error}") from error
  return SamplingParams(**(own | settings))
