"""What every tokenizer can do.

Documents are bytes, and may hold bytes that are not UTF-8: such runs go through the vocabulary's single-byte
pieces, so that a tokenizer with byte pieces and without normalization (every one trained here) is lossless.
"""

import abc
import contextlib
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from jaxllm.base.errors import DataError, UserError, shown
from jaxllm.data import chat
from jaxllm.data.text import to_bytes

Ids = Int32[np.ndarray, " tokens"]
SETTINGS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "cls_token", "sep_token")
# It has half a character, say, or the tokenizer's regular expression takes more steps than Oniguruma allows.
CANNOT = "the tokenizer cannot read this text"
NOTHING = re.compile("((?!))")
NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # bytes that are not UTF-8 decode to these surrogates (PEP 383)


@contextlib.contextmanager
def damaged(problem: str) -> Iterator[None]:
  """Makes what a tokenizer's library raises, from C++ or Rust, a DataError that says `problem`."""
  try:
    yield
  except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
    raise
  except BaseException as error:  # a panic of Rust's is no Exception
    raise DataError(f"{problem}: {shown(str(error))[1:-1]}") from error


class Tokenizer(abc.ABC):
  """Text to ids and back.

  Ids that the vocabulary does not have are None. `fingerprint` is a SHA-256 that two tokenizers share only
  when they encode alike.
  """

  vocab_size: int
  special_ids: frozenset[int]  # tokens that stand for no text
  special_tokens: dict[str, str]  # "bos_token" and so on (ROLES) to the token, for the roles that are filled
  settings: dict[str, Any]  # tokenizer_config.json, chat templates included; travels with the tokenizer
  fingerprint: str
  bos_id: int | None
  eos_id: int | None
  pad_id: int | None
  unk_id: int | None
  mask_id: int | None
  cls_id: int | None
  sep_id: int | None
  _merges: bool  # a byte pair encoding
  _byte_ids: dict[int, int]  # single-byte pieces, where the vocabulary has them
  _byte_runs: re.Pattern  # what of a text goes through them

  def encode(self, text: str | bytes) -> Ids:
    """Ids of a document; adds no special tokens and reads none in the text (they are plain characters)."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str | bytes]) -> list[Ids]:
    """`encode` of each text, on all cores."""
    texts = [to_bytes(text).decode("utf-8", "surrogateescape") for text in texts]
    plain = [not self._byte_runs.search(text) for text in texts]
    encoded = iter(self._encode_plain([text for text, ok in zip(texts, plain) if ok]))
    return [np.array(next(encoded) if ok else self._encode_runs(t), np.int32) for t, ok in zip(texts, plain)]

  def _encode_runs(self, text: str) -> list[int]:
    """Ids of a text that has runs of bytes."""
    ids = []
    for index, run in enumerate(self._byte_runs.split(text)):
      if index % 2:
        ids += self._encode_bytes(run)
      elif run:
        ids += self._encode_run(run, follows=index > 0)
    return ids

  @abc.abstractmethod
  def _encode_plain(self, texts: list[str]) -> list[list[int]]:
    """Ids of documents without runs of bytes."""

  @abc.abstractmethod
  def _encode_run(self, text: str, follows: bool) -> list[int]:
    """Ids of a part of a document; `follows`: it stands behind a run of bytes."""

  @abc.abstractmethod
  def encode_pair(self, first: str, second: str | None = None, *, add_special: bool = True) -> tuple[Ids, Ids]:
    """What a model reads of a text or of two, as `transformers` tokenizers give it: (ids, token types).

    Special tokens in the text are themselves; `add_special` adds those of the tokenizer's own template
    ("[CLS] first [SEP] second [SEP]", say). Token types are 0 for the first text and 1 for the second
    where the template tells them apart.
    """

  def encode_prompt(self, text: str, *, add_special: bool = True, max_tokens: int | None = None) -> Ids:
    """What a model reads of a text: the ids of `encode_pair`, cut to `max_tokens` within what stands around them, at
    the end unless the settings' `truncation_side` is "left"."""
    ids = self.encode_pair(text, add_special=add_special)[0]
    if max_tokens is None or len(ids) <= max_tokens:
      return ids
    inner = self.encode_pair(text, add_special=False)[0]
    at = next(i for i in range(len(ids)) if np.array_equal(ids[i : i + len(inner)], inner))
    behind = ids[at + len(inner) :]
    room = max(max_tokens - at - len(behind), 0)
    kept = inner[len(inner) - room :] if self.settings.get("truncation_side") == "left" else inner[:room]
    return np.concatenate([ids[:at], kept, behind])

  def encode_chat(self, text: str) -> Ids:
    """Ids of a rendered chat, whose special tokens the template has written already."""
    return self.encode_prompt(text, add_special=False)

  @abc.abstractmethod
  def encode_chats(self, texts: Sequence[str]) -> list[tuple[Ids, Int32[np.ndarray, "tokens 2"]]]:
    """`encode_chat` of each text, and of each token where in the text it begins and ends, in characters."""

  @abc.abstractmethod
  def token_text(self, id: int) -> str:
    """A token as the vocabulary spells it; of a special one that is what stands for it in a chat; "" if none has it."""

  @abc.abstractmethod
  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """The bytes that `ids` stand for; special tokens stand for none, nor do ids that no token has."""

  def decode(self, ids: Iterable[int], tidy: bool = True) -> str:
    """Text of `ids`; bytes that are not UTF-8 (a character cut in two, say) show as U+FFFD. `tidy`: see `tidies`."""
    text = self.decode_bytes(ids).decode("utf-8", "replace")
    return tidied(text) if tidy and self.tidies else text

  @property
  def tidies(self) -> bool:
    """Whether decoded texts are `tidied`: as `transformers` has it, where the settings ask for it, and of byte pair
    encodings only where they insist.
    """
    forced = self.settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    return bool(self.settings.get("clean_up_tokenization_spaces") and (forced or not self._merges))

  @abc.abstractmethod
  def pieces(self) -> list[bytes]:
    """What each id adds to a text that it stands in the middle of: " the", "ing", b"\xe2"; specials nothing."""

  def pad(
    self, rows: Sequence[Sequence[int]], *, length: int | None = None, side: str | None = None
  ) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Rows of ids as one array, and where it holds tokens.

    Args:
      length: T; None: the longest row's.
      side: "left" or "right"; None: the tokenizer's own, right where it does not say.

    Raises:
      DataError: a row is longer than `length`.
    """
    longest = max(map(len, rows), default=0)
    length = longest if length is None else length
    if longest > length:
      raise DataError(f"a row of {longest} tokens does not fit in {length}; shorten it")
    # A mask stands beside the ids, so a vocabulary without padding can take any token.
    fill = next((i for i in (self.pad_id, self.eos_id) if i is not None), 0)
    ids, mask = np.full((len(rows), length), fill, np.int32), np.zeros((len(rows), length), bool)
    for n, row in enumerate(rows):
      place = slice(length - len(row), length) if (side or self.padding_side) == "left" else slice(len(row))
      ids[n, place], mask[n, place] = row, True
    return ids, mask

  @property
  def padding_side(self) -> str:
    """ "left" or "right", as the tokenizer's settings say."""
    return self.settings.get("padding_side", "right")

  @property
  def max_tokens(self) -> int | None:
    """How many tokens a model may be given, as the settings say; None: they do not say, or a number beyond measure."""
    length = self.settings.get("model_max_length")
    return length if isinstance(length, int) and 0 < length < 1 << 31 else None

  @property
  def start_id(self) -> int:
    """What stands before a document's first token: BOS, or EOS where there is no BOS (as GPT-2 does)."""
    start = self.eos_id if self.bos_id is None else self.bos_id
    if start is None or self.eos_id is None:
      raise DataError(
        "the tokenizer has no end-of-text token, which separates documents; name it as eos_token "
        f"in {SETTINGS_FILE} beside it"
      )
    return start

  @property
  def chat_templates(self) -> dict[str, str]:
    """Jinja templates of chats by name; the usual one is "default". Empty for a model that does not chat."""
    return named_templates(self.settings)

  def render_chat(self, messages: Sequence[dict], *, template: str | None = None, **options) -> str:
    """The text of a chat as the model was trained to read it.

    Args:
      template: a template's name; None: "tool_use" if there are tools and such a template, else "default".
      options: of `jaxllm.data.chat.render_chat`.

    Raises:
      DataError: there is no such template, or it cannot render these messages.
    """
    text = self.chat_template(template, tools=bool(options.get("tools")))
    return chat.render_chat(text, messages, **(self.special_tokens | options))

  def chat_template(self, name: str | None = None, *, tools: bool = False) -> str:
    """The template that `render_chat` takes, which describes arguments and errors."""
    name = name or ("tool_use" if tools and "tool_use" in self.chat_templates else "default")
    if name not in self.chat_templates:
      there = ", ".join(sorted(self.chat_templates))
      raise DataError(
        f"the tokenizer has no chat template {name!r}, it has {there}; name one of them"
        if there
        else f"the tokenizer has no chat template; put one beside it as {TEMPLATE_FILE}"
      )
    return self.chat_templates[name]

  @functools.cached_property
  def end_of_turn_id(self) -> int | None:
    """The special token that the chat template writes behind a reply; None if there is none."""
    if not self.chat_templates:
      return None
    try:
      marker = "jaxllm-reply"
      text = self.render_chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}])
    except DataError:  # a template that wants other messages; the settings name the end then
      return None
    rest = self.encode_chat(text.rpartition(marker)[2]) if marker in text else ()
    return next((int(i) for i in rest if i in self.special_ids), None)

  @abc.abstractmethod
  def with_settings(self, settings: dict[str, Any]) -> "Tokenizer":
    """The same tokenizer with another tokenizer_config.json."""

  @abc.abstractmethod
  def files(self) -> dict[str, bytes]:
    """What `load_tokenizer` reads, by file name."""

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the files that `load_tokenizer(directory)` reads."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TEMPLATE_FILE).unlink(missing_ok=True)  # an older one would overrule the settings
    for name, data in self.files().items():
      (directory / name).write_bytes(data)

  def _set_special(self, tokens: dict[str, str], ids: dict[str, int]) -> None:
    """Fills `special_tokens` and bos_id and so on."""
    self.special_tokens = tokens
    for role in ROLES:
      setattr(self, role.replace("_token", "_id"), ids.get(role))

  def _encode_bytes(self, run: str) -> list[int]:
    """Ids of bytes that are not UTF-8, given as surrogates, or of a SentencePiece space."""
    ids = [self._byte_ids.get(byte, self.unk_id) for byte in to_bytes(run)]
    known = [i for i in ids if i is not None]
    if len(known) < len(ids):
      raise DataError(f"the tokenizer has no piece for the bytes {to_bytes(run)[:8]!r}, nor one for what is unknown")
    return known


def tidied(text: str) -> str:
  """The text without the spaces that stand before punctuation and English contractions where words are tokens."""
  for ending in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
    text = text.replace(ending, ending.strip())
  return text


def token_text(token: str | dict[str, Any] | None) -> str | None:
  """A token of tokenizer_config.json, which spells it as a string or as an object with its `content`."""
  return token["content"] if isinstance(token, dict) else token


def special_of(settings: dict[str, Any]) -> list[str | dict[str, Any]]:
  """The special tokens that tokenizer_config.json names: of the roles, of roles of its own ("image_token"), others."""
  tokens = [value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str | dict)]
  for name in ("additional_special_tokens", "extra_special_tokens"):
    named = settings.get(name) or ()
    tokens += [t for t in (named.values() if isinstance(named, dict) else named) if isinstance(t, str | dict)]
  return [token for token in tokens if isinstance(token, str) or isinstance(token.get("content"), str)]


def settings_file(settings: dict[str, Any]) -> dict[str, bytes]:
  """tokenizer_config.json by its name."""
  objects = {
    name: {**v, "__type": "AddedToken"} for name, v in settings.items() if name in ROLES and isinstance(v, dict)
  }
  return {SETTINGS_FILE: (json.dumps(settings | objects, indent=2, ensure_ascii=False) + "\n").encode()}


def named_templates(settings: dict[str, Any]) -> dict[str, str]:
  """Chat templates of tokenizer_config.json by name; it spells them as a string or as a list of named ones."""
  found = settings.get("chat_template") or []
  return {"default": found} if isinstance(found, str) else {named["name"]: named["template"] for named in found}
