"""tokenizer_config.json and the files beside it, by declared types."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from jaxllm.base.errors import DataError, shown
from jaxllm.base.ranges import Range
from jaxllm.base.strangers import declared

MAX_TOKENS = 1 << 22  # ids of a vocabulary; ten times as many as the largest has
TokenId = Annotated[int, Range(0, MAX_TOKENS - 1)]


class _Content(TypedDict):
  content: str


class AddedToken(_Content, total=False):
  """A token as an object."""

  single_word: bool
  lstrip: bool
  rstrip: bool
  normalized: bool
  special: bool


class _NamedTemplate(TypedDict):
  name: str
  template: str


Token = str | AddedToken


class Settings(TypedDict, total=False):
  """What is read of tokenizer_config.json and special_tokens_map.json; a null is a default, or no token."""

  bos_token: Token | None
  eos_token: Token | None
  pad_token: Token | None
  unk_token: Token | None
  mask_token: Token | None
  cls_token: Token | None
  sep_token: Token | None
  additional_special_tokens: list[Token | TokenId] | dict[str, Token]
  extra_special_tokens: list[Token | TokenId] | dict[str, Token]
  added_tokens_decoder: dict[str, AddedToken]
  chat_template: str | list[_NamedTemplate]
  padding_side: Literal["left", "right"]
  truncation_side: Literal["left", "right"]
  tokenizer_class: str
  add_bos_token: bool | None
  add_eos_token: bool | None
  add_prefix_space: bool | None
  legacy: bool | None
  legacy_behaviour: bool
  src_lang: str | None
  split_by_punct: bool
  trim_offsets: bool
  clean_up_tokenization_spaces: bool | None
  clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output: bool | None
  extra_ids: Annotated[int, Range(0, 100_000)]
  do_lower_case: bool
  tokenize_chinese_chars: bool
  strip_accents: bool | None


# Of the other keys, those that say nothing of how a text is read: of places, of padding and cutting, of what programs
# do with the model, and what `transformers` 5 does not read either.
_HARMLESS = """
  model_max_length max_length max_len stride truncation_strategy truncation padding pad_token_type_id
  pad_to_multiple_of tokenizer_file vocab_file merges_file spm_file name_or_path special_tokens_map_file init_inputs
  full_tokenizer_file fast_tokenizer_files model_input_names processor_class trust_remote_code use_fast from_slow
  is_local local_files_only errors do_basic_tokenize never_split verbose use_default_system_prompt sp_model_kwargs
  unk_id spaces_between_special_tokens tgt_lang language_codes num_madeup_words backend
  response_schema response_template chat_control_tokens tool_use_template grounded_generation_template device_map
  default_chat_template model_type transformers_version files_loaded remove_space keep_accents wordpieces_prefix
  special_tokens clean_text use_regex vocab_size model_specific_special_tokens add_special_tokens is_fast revision
  auto_map image_seq_length image_seq_len num_image_tokens add_dummy_prefix
"""
_IF_TRUE = ("split_special_tokens", "fix_mistral_regex", "do_word_tokenize")  # and which, if they are false


def unread(settings: Mapping[str, Any]) -> list[str]:
  """The keys of tokenizer_config.json that may change how texts are read, and are not read here."""
  known = {*_HARMLESS.split(), *Settings.__annotations__}
  own = (
    key for key in settings if not key.startswith("_") and not key.endswith(("_token", "_token_id", "_tokens_map"))
  )
  return [key for key in own if key not in known and not (key in _IF_TRUE and not settings[key])]


class AddedTokens(TypedDict, total=False):
  """added_tokens.json or vocab.json, under a name."""

  ids: dict[str, TokenId]


def checked(settings: Mapping[str, Any], what: str) -> dict[str, Any]:
  """The settings, those above by their types and the others as they are.

  Raises:
    DataError: a value is of another type, or an id no token's.
  """
  found = declared(Settings, settings, what, DataError)
  for i in found.get("added_tokens_decoder", ()):
    if not (i.isascii() and i.isdigit() and len(i) < 9 and int(i) < MAX_TOKENS):
      raise DataError(f"{what}: added_tokens_decoder has the id {shown(i)}, which no token can have")
  return {name: value for name, value in settings.items() if name not in Settings.__annotations__} | found
