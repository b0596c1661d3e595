"""Which tokens of a conversation are trained, by their position in it; ids are never searched for a pattern.

Where an assistant's turn stands follows from {% generation %} blocks, if the chat template has them. Else it is what a
rendering of the conversation up to that turn adds to the rendering of what was before, with the prompt for a reply;
both must be prefixes of the whole, which is tokenized once, with positions. A turn ends behind the token that stops
generation, and that token is trained with it.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from jaxllm.base.errors import DataError
from jaxllm.data.chat import MARKS, marks_generation, render_chat
from jaxllm.data.config import ChatConfig
from jaxllm.data.conversations import TEXT, Conversation, Message
from jaxllm.data.tokenizers import Tokenizer

# Reasoning that stands in the content itself; it may begin in the prompt for a reply.
_THOUGHT = re.compile(r"\s*+(<think>)?.*?</think>\s*", re.DOTALL)


class Example(NamedTuple):
  """Token ids, and each one's weight in the loss that it is predicted with."""

  ids: Int32[np.ndarray, " tokens"]
  weights: Float32[np.ndarray, " tokens"]


class _Turn(NamedTuple):
  """Characters of the rendered conversation that have a weight of their own."""

  start: int
  end: int
  weight: float
  silent: int  # up to here the turn is read and not trained: the reasoning, where it is masked


class _Rendered(NamedTuple):
  text: str
  turns: list[_Turn]


@dataclasses.dataclass(frozen=True)
class Masker:
  """Conversations as token ids with weights."""

  tokenizer: Tokenizer
  config: ChatConfig = ChatConfig()

  def __call__(self, conversations: Sequence[Conversation]) -> list[Example]:
    """Raises DataError for the first that cannot be trained as it should; the message does not say which."""
    rendered = [self._render(one) for one in conversations]
    encoded = self.tokenizer.encode_chats([one.text for one in rendered])
    return [self._example(*facts) for facts in zip(conversations, rendered, encoded)]

  @functools.cached_property
  def _begins_with_bos(self) -> bool:
    """Whether the tokenizer puts BOS before a text."""
    ids = self.tokenizer.encode_prompt("a")
    return len(ids) > 0 and ids[0] == self.tokenizer.bos_id

  @functools.cached_property
  def _stops(self) -> list[int]:
    return [i for i in (self.tokenizer.eos_id, self.tokenizer.end_of_turn_id) if i is not None]

  @functools.cached_property
  def _control(self) -> list[str]:
    """The tokens that begin and end turns, as they are spelled."""
    try:
      ids = self.tokenizer.encode_chat(self.tokenizer.render_chat([{"role": "user", "content": "?"}]))
    except DataError:  # a template that wants other messages
      ids = np.zeros(0, np.int32)
    return [self.tokenizer.token_text(i) for i in sorted({*self._stops, *ids[np.isin(ids, self._special)].tolist()})]

  @functools.cached_property
  def _special(self) -> list[int]:
    return sorted(self.tokenizer.special_ids)

  # Which characters

  def _render(self, conversation: Conversation) -> _Rendered:
    everywhere = float(self.config.train_on == "all")
    if conversation.messages[0].role == TEXT:
      texts, start, turns = [message.content for message in conversation.messages], 0, []
      for number, text in enumerate(texts):
        weight = 1.0 if number >= conversation.prompt else everywhere
        turns.append(_Turn(start, start + len(text), weight, start))
        start += len(text)
      return _Rendered("".join(texts), turns)
    if self.config.reasoning != "train":
      for n, message in enumerate(conversation.messages):
        if message.role == "assistant" and "<think>" in message.content and not _THOUGHT.match(message.content):
          raise DataError(
            f"message {n + 1} (assistant) has reasoning without an end, </think>, so that it cannot be told from the "
            "answer; mend it, or set data.chat.reasoning to 'train'"
          )
    if self.config.reasoning == "drop":
      bare = tuple(_without_reasoning(message) for message in conversation.messages)
      conversation = dataclasses.replace(conversation, messages=bare)
    weights = self._weights(conversation)
    mask_reasoning = self.config.reasoning == "mask"
    replies = [n for n, message in enumerate(conversation.messages) if message.role == "assistant"]
    wanted = [n for n in replies if weights[n] != everywhere or mask_reasoning]
    text = self._text(conversation)
    spans = self._spans(conversation, text, wanted)
    self._check_complete(conversation, text, spans)
    silent = self._ends_of_reasoning(conversation, text) if mask_reasoning else {}
    return _Rendered(text, [_Turn(*spans[n], weights[n], silent.get(n, spans[n][0])) for n in wanted])

  def _weights(self, conversation: Conversation) -> list[float]:
    """The weight of each message; of the spaces between them the one of prompts."""
    messages, config = conversation.messages, self.config
    weights = [float(config.train_on == "all")] * len(messages)
    for number, message in enumerate(messages):
      if message.role == "assistant":
        trained = number >= conversation.prompt and (config.train_on != "last" or number == len(messages) - 1)
        weights[number] = max(weights[number], float(trained)) if message.weight is None else message.weight
        if config.train_on == "last" and not trained or message.tool_calls and config.tool_calls == "mask":
          weights[number] = 0.0
    return weights

  def _template(self, conversation: Conversation) -> str:
    if not self.tokenizer.chat_templates:
      raise DataError(
        "the tokenizer has no chat template: set data.chat.template to a Jinja file, or begin with a chat model "
        "(model_init.path, data.tokenizer.path)"
      )
    return self.tokenizer.chat_template(tools=bool(conversation.tools))

  def _text(self, conversation: Conversation, **options: Any) -> str:
    template = self._template(conversation)
    variables = self.tokenizer.special_tokens | self.config.variables | options
    messages = [message.for_template() for message in conversation.messages]
    return render_chat(template, messages, tools=list(conversation.tools) or None, **variables)

  def _spans(self, conversation: Conversation, text: str, wanted: list[int]) -> dict[int, tuple[int, int]]:
    """Where in the text the wanted messages stand."""
    if marks_generation(self._template(conversation)):
      marked, ends = _take_marks(self._text(conversation, mark_generation=True))
      numbers = [n for n, message in enumerate(conversation.messages) if message.role == "assistant"]
      if marked != text:
        raise DataError("the chat template rewrites what stands in its {% generation %} blocks")
      blocks = _joined(list(zip(ends[::2], ends[1::2])))
      if len(blocks) != len(numbers):
        raise DataError(
          f"the chat template has {len(blocks)} {{% generation %}} blocks for {len(numbers)} replies; each reply "
          "needs one of its own"
        )
      return {n: span for n, span in zip(numbers, blocks) if n in wanted}
    spans = {}
    for n in wanted:
      before = dataclasses.replace(conversation, messages=conversation.messages[:n])
      start = self._text(before, add_generation_prompt=True)
      until = dataclasses.replace(conversation, messages=conversation.messages[: n + 1])
      end = self._text(until) if n + 1 < len(conversation.messages) else text
      if not (text.startswith(start) and text.startswith(end) and len(start) < len(end)):
        bare = self._text(before)
        if text.startswith(end) and text.startswith(bare) and start.startswith(bare):
          raise DataError(
            f"the chat template is not prefix-stable: its prompt for a reply is {start[len(bare) :]!r}, and message "
            f"{n + 1} begins otherwise. Set data.chat.variables so that it fits (enable_thinking, say), or put "
            "{% generation %} around replies in a copy of the template and name that as data.chat.template"
          )
        raise DataError(
          f"the chat template is not prefix-stable: it writes the turns up to message {n + 1} otherwise when others "
          "follow (it drops reasoning of earlier turns, say). Put {% generation %} around replies in a copy of it and "
          "name that as data.chat.template, or set data.chat.train_on to 'last'"
        )
      spans[n] = len(start), len(end)
    return spans

  def _check_complete(self, conversation: Conversation, text: str, spans: dict[int, tuple[int, int]]) -> None:
    """That the template has written all that the messages say."""
    for n, message in enumerate(conversation.messages):
      if mark := next((mark for mark in self._control if mark in message.content), None):
        raise DataError(
          f"message {n + 1} ({message.role}) has {mark!r} in its text, which would begin or end a turn; take it out"
        )
      where = text[slice(*spans[n])] if n in spans else text
      parts = [] if message.role == "tool" else re.split("</?think>", message.content)
      if message.role == "assistant":
        # What was only read may be without its reasoning, as where the model has answered.
        trained = n in spans or self.config.train_on == "all"
        parts = [*parts, message.reasoning] if trained else parts[-1:]
        parts += [call["function"]["name"] for call in message.tool_calls]
      lost = next((part for part in parts if part.strip() not in where), None)
      if lost is not None:
        what = "the reasoning" if lost == message.reasoning else "parts"
        hint = "set data.chat.reasoning to 'drop', or " if "</think>" in message.content or message.reasoning else ""
        raise DataError(
          f"the chat template changes turns: it leaves out {what} of message {n + 1} ({message.role}), "
          f"{lost.strip()[:40]!r}; {hint}name a template that keeps them as data.chat.template"
        )
    names = [tool.get("function", tool).get("name", "") for tool in conversation.tools]
    if not all(name in text for name in names):
      raise DataError("the chat template leaves out the tools; name one that has them as data.chat.template")

  def _ends_of_reasoning(self, conversation: Conversation, text: str) -> dict[int, int]:
    """Where in the text the answer begins, of messages with reasoning: a mark shows it, which the text has not."""
    messages, numbers = list(conversation.messages), []
    for n, message in enumerate(messages):
      if message.role != "assistant":
        continue
      thought = _THOUGHT.match(message.content)
      at = thought.end() if thought else len(message.content) - len(message.content.lstrip())
      if message.content and (thought or message.reasoning):
        marked = message.content[:at] + MARKS[0] + message.content[at:]
        messages[n] = dataclasses.replace(message, content=marked)
      elif message.reasoning:
        messages[n] = dataclasses.replace(message, reasoning=message.reasoning + MARKS[0])
      else:
        continue
      numbers.append(n)
    plain, ends = _take_marks(self._text(dataclasses.replace(conversation, messages=tuple(messages))))
    if plain != text or len(ends) != len(numbers):
      raise DataError(
        "the chat template rewrites replies, so that the end of their reasoning has no place; set data.chat.reasoning "
        "to 'train' or 'drop'"
      )
    return dict(zip(numbers, ends))

  # Which tokens

  def _example(
    self, conversation: Conversation, rendered: _Rendered, encoded: tuple[np.ndarray, np.ndarray]
  ) -> Example:
    ids, positions = encoded
    is_text = conversation.messages[0].role == TEXT
    weights = np.full(len(ids), float(self.config.train_on == "all"), np.float32)
    for turn in rendered.turns:
      first, last = self._tokens(positions, turn.start, turn.end)
      if not is_text:
        last = self._behind_stop(ids, positions, rendered.text, first, last, self._template(conversation))
      weights[first:last] = turn.weight
      weights[first : self._tokens(positions, turn.start, turn.silent)[1]] = 0
    if is_text:
      bos = [self.tokenizer.bos_id] if self._begins_with_bos else []
      eos = [] if self.tokenizer.eos_id in ids[-1:] else [self.tokenizer.eos_id]  # a text may bring its own
      ids = np.concatenate([bos, ids, eos]).astype(np.int32)
      weights = np.concatenate([[0] * len(bos), weights, weights[-1:] if eos else []]).astype(np.float32)
    self._check_bos(ids)
    weights[:1] = 0  # nothing predicts the first
    if not weights.any():
      raise DataError("no token is trained: no assistant's turn has a weight above 0")
    return Example(ids, weights)

  def _tokens(self, positions: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """The tokens of these characters, which none may share with characters outside."""
    first, last = np.searchsorted(positions[:, 0], [start, end])
    for edge, place in ((first, start), (last, end)):
      if edge and positions[edge - 1, 1] > place:
        raise DataError(
          "the tokenizer joins the end of a prompt with the beginning of what follows in one token, which no model "
          "that has read the prompt can write; move or strip the spaces and line breaks between them"
        )
    return int(first), int(last)

  def _behind_stop(
    self, ids: np.ndarray, positions: np.ndarray, text: str, first: int, last: int, template: str
  ) -> int:
    """Where a turn ends: behind the token that stops generation, which may stand just outside of its characters."""
    special = first + np.flatnonzero(np.isin(ids[first:last], self._special))
    stop = int(special[-1]) if len(special) else -1
    if stop >= 0 and text[positions[stop, 1] : positions[last - 1, 1]].strip():
      stop = -1
    if (stop < 0 or ids[stop] not in self._stops) and last < len(ids) and ids[last] in self._stops:
      stop = last
    if stop < 0:
      raise DataError(
        "a stop token is never trained: the chat template ends a reply with no special token; name one that does as "
        "data.chat.template"
      )
    early = first + int(np.argmax(np.isin(ids[first : stop + 1], self._stops)))
    # More than one special token may end a reply; a stop token with text behind it stands in the reply.
    for token in np.flatnonzero(~np.isin(ids[early:stop], self._special)) + early:
      if ids[early] in self._stops and text[slice(*positions[token])].strip():
        raise DataError(f"a reply has {self.tokenizer.token_text(ids[early])!r}, which ends it, in its text")
    # A template with marks says itself how far a turn goes.
    return max(last, stop + 1) if marks_generation(template) else stop + 1

  def _check_bos(self, ids: np.ndarray) -> None:
    bos = self.tokenizer.bos_id
    if bos is None or not self._begins_with_bos:
      return
    if list(ids[:2]) == [bos, bos]:
      raise DataError("BOS is doubled: the template or the text writes it again; take it out of one")
    if ids[0] != bos and self.config.require_bos:
      raise DataError(
        "BOS is missing: the tokenizer begins texts with it and the chat template does not; begin a copy of it with "
        "{{ bos_token }} and name that as data.chat.template, or set data.chat.require_bos to False"
      )


def _take_marks(text: str) -> tuple[str, list[int]]:
  """The text without marks, and where they stood in it."""
  parts = re.split(f"[{''.join(MARKS)}]", text)
  return "".join(parts), np.cumsum([len(part) for part in parts[:-1]], dtype=int).tolist()


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
  """Those that touch as one, without empty ones."""
  joined: list[tuple[int, int]] = []
  for start, end in spans:
    if joined and joined[-1][1] == start:
      joined[-1] = joined[-1][0], end
    elif start < end:
      joined.append((start, end))
  return joined


def _without_reasoning(message: Message) -> Message:
  thought = _THOUGHT.match(message.content) if message.role == "assistant" else None
  return dataclasses.replace(message, reasoning="", content=message.content[thought.end() if thought else 0 :])
