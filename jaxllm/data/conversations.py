"""Instruction data: the rows of every common format become one value, a `Conversation` or a `Preference`.

Formats: Alpaca (Taori et al. 2023), ShareGPT, OpenAI's messages, prompt and completion, and plain text, with the
column names that TRL and LLaMA-Factory read. A text without roles is a message of the role "text", which no chat
template sees.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.base.errors import DataError

TEXT = "text"  # the role of a text without one
# What data calls the roles of chat templates.
_ROLES = {
  "system": "system", "developer": "system",
  "user": "user", "human": "user", "prompter": "user",
  "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
  "ai": "assistant", "bard": "assistant", "bing": "assistant", "function_call": "assistant",
  "tool": "tool", "observation": "tool", "ipython": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("weight", "loss_weight", "train")
# Who may speak after whom.
_NEXT = {
  "the beginning": ("system", "user"),
  "system": ("user",),
  "user": ("assistant",),
  "assistant": ("user",),
  "a tool call": ("tool",),
  "tool": ("tool", "assistant"),
}


@dataclasses.dataclass(frozen=True)
class Message:
  """What one side says. `weight` is that of its tokens in the loss; None: as the settings say."""

  role: str
  content: str = ""
  reasoning: str = ""  # what an assistant thinks before it answers
  tool_calls: tuple[dict[str, Any], ...] = ()  # each {"type": "function", "function": {"name": …, "arguments": {…}}}
  name: str = ""  # of the tool that answers
  tool_call_id: str = ""
  weight: float | None = None
  silent: bool = False  # calls tools with no content at all, which templates may tell from an empty one

  def for_template(self) -> dict[str, Any]:
    """As chat templates read it."""
    fields = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": self.reasoning}
    calls = {"tool_calls": list(self.tool_calls)} if self.tool_calls else {}
    return (
      {"role": self.role, "content": None if self.silent else self.content}
      | {k: v for k, v in fields.items() if v}
      | calls
    )


@dataclasses.dataclass(frozen=True)
class Conversation:
  """`prompt` messages that were there before, and those that a model should learn to write."""

  messages: tuple[Message, ...]
  tools: tuple[dict[str, Any], ...] = ()  # JSON schemas of the functions that the model may call
  prompt: int = 0


@dataclasses.dataclass(frozen=True)
class Preference:
  """Two ways to go on from one prompt."""

  prompt: tuple[Message, ...]
  chosen: tuple[Message, ...]
  rejected: tuple[Message, ...]
  tools: tuple[dict[str, Any], ...] = ()

  @property
  def sides(self) -> tuple[Conversation, ...]:
    """The chosen and the rejected conversation, whose prompt has no weight whatever its messages say."""
    prompt = tuple(dataclasses.replace(message, weight=None) for message in self.prompt)
    return tuple(Conversation(prompt + s, self.tools, len(self.prompt)) for s in (self.chosen, self.rejected))


def to_json(value: Conversation | Preference) -> bytes:
  """Raises DataError for text that is not UTF-8."""
  facts = {name: _plain(part) for name, part in vars(value).items() if part}
  try:
    return json.dumps(facts, ensure_ascii=False).encode()
  except (UnicodeEncodeError, TypeError, ValueError) as error:
    raise DataError(f"the messages hold what is neither UTF-8 text nor JSON: {error}") from error


def _plain(part: Any) -> Any:
  if isinstance(part, tuple):
    return [_plain(item) for item in part]
  if isinstance(part, Message):
    return {name: value for name, value in vars(part).items() if value or name == "weight" and value is not None}
  return part


def from_json(data: bytes) -> Conversation | Preference:
  """The inverse of `to_json`."""
  facts = json.loads(data)
  for name in {"messages", "prompt", "chosen", "rejected"} & facts.keys():
    if isinstance(facts[name], list):
      calls = [{"tool_calls": tuple(message.get("tool_calls", ()))} for message in facts[name]]
      facts[name] = tuple(Message(**message | call) for message, call in zip(facts[name], calls))
  facts["tools"] = tuple(facts.get("tools", ()))
  return Conversation(**facts) if "messages" in facts else Preference(**{"prompt": ()} | facts)


def conversation_of(row: Any, format: str = "auto", columns: Mapping[str, str] | None = None) -> Conversation:
  """The conversation that stands in a row.

  Args:
    format: of `SourceConfig.format`; "auto": by the names of the columns.
    columns: the standard name of a column (or of a message's "role" and "content") to the one that it has here.

  Raises:
    DataError: a column is missing, or they hold no conversation that ends with what an assistant says.
  """
  row, keys = _renamed(row, columns or {})
  found = _format(row, format, ("messages", "conversations", "instruction", "completion", "text"))
  if found == "text":
    return Conversation((Message(TEXT, _string(row, "text")),))
  if found == "prompt_completion":
    prompt, completion = _column(row, "prompt"), _column(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
      _check_bare(row)
      texts = [Message(TEXT, prompt)] if prompt else []
      return Conversation((*texts, Message(TEXT, _string(row, "completion"))), prompt=len(texts))
    before, after = _turns(prompt, "user", keys), _turns(completion, "assistant", keys)
  else:
    before, after = (), _prompt(row, found, keys)
    if found == "alpaca":
      after += (Message("assistant", _string(row, "output")),)
  before, after = (_with_system(row, before), after) if before else (before, _with_system(row, after))
  _check_order(before + after)
  return Conversation(before + after, _tools(row), len(before))


def preference_of(row: Any, format: str = "auto", columns: Mapping[str, str] | None = None) -> Preference:
  """The preference that stands in a row, with "chosen" and "rejected"; arguments and errors as `conversation_of`.

  The prompt stands in columns of its own as the format says, or is what the two have in common.
  """
  row, keys = _renamed(row, columns or {})
  chosen, rejected = _column(row, "chosen"), _column(row, "rejected")
  names = ("messages", "conversations", "instruction", "prompt")
  prompt = row.get("prompt") if format in ("auto", "prompt_completion") else None
  if chosen == rejected:
    raise DataError("chosen and rejected are the same")
  texts = isinstance(chosen, str) and isinstance(rejected, str)
  apart = any(row.get(name) is not None for name in names)  # the prompt has columns of its own
  if texts and (isinstance(prompt, str) or not apart):
    _check_bare(row)
    shared = _shared_words(chosen, rejected) if prompt is None else ""
    sides = [(Message(TEXT, side.removeprefix(shared)),) for side in (chosen, rejected)]
    if not (chosen.strip() and rejected.strip()):
      raise DataError("chosen or rejected has no text")
    return Preference((Message(TEXT, prompt or shared),) if prompt or shared else (), *sides)
  first, second = (_turns(side, "assistant", keys) for side in (chosen, rejected))
  before: tuple[Message, ...] = ()
  if apart and not (isinstance(prompt, str) and first[0].role != "assistant"):
    found = _format(row, format, names)
    before = _turns(prompt, "user", keys) if found == "prompt_completion" else _prompt(row, found, keys)
    first, second = (s[len(before) :] if s[: len(before)] == before else s for s in (first, second))
  if first == second:
    raise DataError("chosen and rejected are the same")
  ours, theirs = first[:-1], second[:-1]
  same = next((n for n, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
  before, first, second = _with_system(row, before + first[:same]), first[same:], second[same:]
  for side in (first, second):
    _check_order(before + side)
  return Preference(before, first, second, _tools(row))


def _check_bare(row: Mapping[str, Any]) -> None:
  """That texts, which no chat template sees, come without what only a template could write."""
  if extra := [name for name in ("system", "tools") if row.get(name)]:
    raise DataError(
      f"column {extra[0]!r} has no place beside texts, which no chat template sees; map the prompt to 'instruction' "
      "(and the completion to 'output'), which are put into the template"
    )


def _shared_words(first: str, second: str) -> str:
  """The words with which both begin, without spaces behind them."""
  shared = os.path.commonprefix([first, second])
  if shared and not shared[-1].isspace():
    shared = shared.removesuffix(shared.rsplit(maxsplit=1)[-1])
  return shared.rstrip()


def _renamed(row: Any, columns: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
  """The row by standard names, and the keys of its messages."""
  if not isinstance(row, Mapping):
    raise DataError(f"a JSON object is needed, this is {type(row).__name__}")
  keys = {name: columns[name] for name in ("role", "content") if name in columns}
  missing = [theirs for name, theirs in columns.items() if name not in keys and theirs not in row]
  if missing:
    raise DataError(f"no column {missing[0]!r}, which the source's `columns` names; it has: {', '.join(row)}")
  row = {name: v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for name, v in row.items()}
  named = {name: row[theirs] for name, theirs in columns.items() if name not in keys}
  # A column that is mapped stands for nothing else.
  return {name: v for name, v in row.items() if name not in columns.values()} | named, keys


def _format(row: Mapping[str, Any], format: str, columns: Sequence[str]) -> str:
  """The format's name: the one given, or that of the first of `columns` that is there."""
  names = {"messages": "openai", "conversations": "sharegpt", "instruction": "alpaca", "text": "text"}
  names |= dict.fromkeys(("prompt", "completion"), "prompt_completion")
  if format != "auto":
    return format
  found = next((names[column] for column in columns if row.get(column) is not None), None)
  if found is None:
    if {"chosen", "rejected"} <= row.keys():
      raise DataError("columns 'chosen' and 'rejected' are preferences: set data.task to 'preference'")
    raise DataError(
      f"no format has the columns {', '.join(row)}; one of {', '.join(columns)} is needed: set the source's `columns`, "
      'such as {"instruction": "question", "output": "answer"}'
    )
  return found


def _prompt(row: Mapping[str, Any], format: str, keys: Mapping[str, str]) -> tuple[Message, ...]:
  """The messages of a row's own columns, in which Alpaca has no answer."""
  if format == "openai":
    return _turns(_column(row, "messages"), "user", keys)
  if format == "sharegpt":
    return _turns(_column(row, "conversations"), "user", keys)
  history: list[Message] = []
  turns = row.get("history") or ()
  if not isinstance(turns, list | tuple):
    raise DataError("history is a list of pairs [question, answer]")
  for turn in turns:
    if not (isinstance(turn, Sequence) and len(turn) == 2 and all(isinstance(t, str) and t.strip() for t in turn)):
      raise DataError("history is a list of pairs [question, answer], of texts that are not empty")
    history += [Message("user", turn[0]), Message("assistant", turn[1])]
  texts = [_string(row, "instruction")] + [text for text in [row.get("input")] if text]
  return (*history, Message("user", "\n".join(texts)))


def _column(row: Mapping[str, Any], name: str) -> Any:
  if row.get(name) is None:
    raise DataError(f"no column {name!r}; it has: {', '.join(row)} (the source's `columns` can map names)")
  return row[name]


def _string(row: Mapping[str, Any], name: str) -> str:
  text = _column(row, name)
  if not isinstance(text, str) or not text.strip():
    raise DataError(f"column {name!r} must be text that is not empty, this is {str(text)[:40]!r}")
  return text


def _with_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
  """With the row's own system message, if it has one."""
  system = row.get("system")
  return (Message("system", system), *messages) if system and isinstance(system, str) else messages


def _tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
  tools = row.get("tools") or row.get("functions") or ()  # the latter is OpenAI's older name
  if isinstance(tools, str):
    tools = _parsed(tools, "tools")
  if not isinstance(tools, list | tuple) or not all(
    isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools
  ):
    raise DataError("tools is a list of JSON schemas of functions")
  return tuple(tools)


def _parsed(text: str, what: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise DataError(f"{what} is not JSON: {text[:40]!r}") from error


def _turns(value: Any, role: str, keys: Mapping[str, str]) -> tuple[Message, ...]:
  """The messages of a list, of a single message, or of a text that `role` says."""
  if isinstance(value, str):
    value = [{"role": role, "content": value}]
  elif isinstance(value, Mapping):
    value = [value]
  if not isinstance(value, Sequence) or not value or not all(isinstance(item, Mapping) for item in value):
    raise DataError('a conversation is a list of messages such as {"role": "user", "content": "…"}')
  messages = [_message(number, item, keys) for number, item in enumerate(value, 1)]
  return tuple(m for m in messages if m.content or m.role != "system")


def _message(number: int, item: Mapping[str, Any], keys: Mapping[str, str]) -> Message:
  def first(*names: str) -> Any:
    return next((item[name] for name in names if item.get(name) is not None), None)

  spoken = first(keys.get("role", "role"), "from")
  role = _ROLES.get(spoken.lower()) if isinstance(spoken, str) else None
  if role is None:
    raise DataError(f"message {number} has the role {spoken!r}; known are {', '.join(_ROLES)}")
  content = first(keys.get("content", "content"), "value")
  old = item.get("function_call")  # OpenAI's older form, of one call
  calls = item.get("tool_calls") or ([old] if old else [])
  if spoken == "function_call":
    calls, content = _parsed(content or "", f"message {number}"), ""
    calls = calls if isinstance(calls, list) else [calls]
  if not isinstance(calls, list | tuple):
    raise DataError(f"message {number}'s tool_calls are no list")
  if isinstance(content, list):
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
      raise DataError(f"message {number} has parts that are no text, which text models cannot read")
    content = "".join(part["text"] for part in content)
  if not isinstance(content or "", str) or not ((content or "").strip() or calls or role in ("tool", "system")):
    raise DataError(f"message {number} ({role}) has no text")
  reasoning, weight = first(*_REASONING) or "", first(*_WEIGHTS)
  if not isinstance(reasoning, str):
    raise DataError(f"message {number} ({role}) has reasoning that is no text")
  if not isinstance(weight or 0, int | float) or not 0 <= (weight or 0) < 1e300 or (weight and role != "assistant"):
    raise DataError(f"message {number} ({role}) has the weight {weight!r}; weights are an assistant's, and from 0 on")
  return Message(
    role,
    content or "",
    reasoning.strip() if role == "assistant" else "",
    tuple(_call(number, call) for call in calls),
    item.get("name") or "",
    item.get("tool_call_id") or "",
    None if weight is None else float(weight),
    content is None and bool(calls),
  )


def _call(number: int, call: Any) -> dict[str, Any]:
  """A tool call with its arguments as an object, which is how templates read them."""
  function = call.get("function", call) if isinstance(call, Mapping) else {}
  arguments = function.get("arguments") or {}
  if isinstance(arguments, str):
    arguments = _parsed(arguments, f"the arguments of message {number}'s tool call")
  if not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping):
    raise DataError(f'message {number} has a tool call that is no {{"name": "…", "arguments": {{…}}}}')
  own = {"id": call["id"]} if call.get("id") else {}
  return own | {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _check_order(messages: Sequence[Message]) -> None:
  before = "the beginning"
  for number, message in enumerate(messages, 1):
    if message.role not in _NEXT[before]:
      raise DataError(
        f"roles are out of order: message {number} is {message.role}'s, where {before} is followed by "
        f"{' or '.join(_NEXT[before])}"
      )
    before = "a tool call" if message.tool_calls else message.role
  if messages[-1].role != "assistant":
    raise DataError(f"the last message is {messages[-1].role}'s, so that there is nothing to learn from it")
