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
  tokenizer_class: str
  add_bos_token: bool
  add_eos_token: bool
  add_prefix_space: bool
  legacy: bool
  extra_ids: Annotated[int, Range(0, 100_000)]
  do_lower_case: bool
  tokenize_chinese_chars: bool
  strip_accents: bool | None


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
