"""Chat templates: from messages to the text that a chat model reads.

A template is a program that comes with the model, so `chat_program` runs it in a process with limits, on plain values.
"""

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jaxllm.base import bounded
from jaxllm.base.errors import DataError

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which messages keep their reasoning
_TESTS_NONE = re.compile(r"\bcontent\b['\"]?\]?\s+is\s+(not\s+)?none\b")  # a template that knows content: null
_CUT = "CONTINUE_FINAL_MESSAGE_TAG "  # marks where a message that is to be continued ends
_PROGRAM = Path(__file__).with_name("chat_program.py")
MAX_TEMPLATE = 1 << 20  # characters; the longest of a published model has 30,000
# What errors of `chat_program` mean; their messages follow.
_SAYINGS = {
  "UndefinedError": "the chat template needs what these messages do not have: ",
  "SecurityError": "the chat template does what a template may not: ",
  "Refusal": "the chat template refuses these messages: ",
  "Broken": "the chat template is broken in its line ",
}
MARKS = "\ufdd0", "\ufdd1"  # around {% generation %}, where asked for: characters that no text has


def render_chat(
  template: str,
  messages: Sequence[dict[str, Any]],
  *,
  tools: Sequence[dict[str, Any]] | None = None,
  documents: Sequence[dict[str, Any]] | None = None,
  add_generation_prompt: bool = False,
  continue_final_message: bool = False,
  mark_generation: bool = False,
  **variables: Any,
) -> str:
  """The text of a chat.

  Args:
    messages: each {"role": …, "content": …} and what else the template reads ("tool_calls", …).
    tools: JSON schemas of the functions that the model may call.
    documents: what the answer shall rest on, each with "title" and "text".
    add_generation_prompt: ends with what begins a reply.
    continue_final_message: ends with the last message's content, for the model to go on.
    mark_generation: puts `MARKS` around what stands in {% generation %} blocks.
    variables: more that the template may read: bos_token, enable_thinking, ….

  Raises:
    DataError: the messages are no chat, or the template is broken, refuses them, or needs more time, memory or
      characters than a chat can.
  """
  several = isinstance(messages, list | tuple) and messages
  if not several or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
    raise DataError('a chat is a list of at least one message {"role": "user", "content": "…"}')
  lists = [given for given in (tools, documents) if given]
  if not all(isinstance(given, list | tuple) and all(isinstance(item, dict) for item in given) for given in lists):
    raise DataError("tools and documents are lists of JSON objects")
  if continue_final_message and add_generation_prompt:
    raise DataError("a chat either continues its final message or begins a reply; ask for one of the two")
  # A template that could call methods of richer objects would be out of the sandbox.
  inputs = dict(messages=list(messages), tools=tools, documents=documents, **variables)
  try:
    inputs = json.loads(json.dumps(inputs))
  except (TypeError, ValueError, RecursionError) as error:
    raise DataError(f"a chat's messages, tools and documents hold plain JSON values only: {error}") from error
  kept = {"content"} if _TESTS_NONE.search(template) else set()
  inputs["messages"] = [_message(message, kept) for message in inputs["messages"]]
  final = _mark_end(inputs["messages"][-1]) if continue_final_message else ""
  text = _render(template, dict(inputs, add_generation_prompt=add_generation_prompt), mark_generation)
  return _cut_at_mark(text, final) if continue_final_message else text


def _message(message: dict[str, Any], kept: Collection[str]) -> dict[str, Any]:
  """The message without fields of None but for those `kept` (most templates test whether a field is there, or write
  the word None), reasoning by every name."""
  message = {name: value for name, value in message.items() if value is not None or name in kept}
  reasoning = next((message[name] for name in _REASONING if name in message), None)
  if reasoning is None:
    return message
  return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_end(message: dict[str, Any]) -> str:
  """Marks where the message's text ends, in place; returns that text."""
  holder, key = message, "content"
  if isinstance(message.get("content"), list):
    holder, key = next((part for part in reversed(message["content"]) if "text" in part), {}), "text"
  if not isinstance(holder.get(key), str):
    raise DataError("the final message has no text to continue")
  text = holder[key]
  holder[key] = text + _CUT
  return text


def _cut_at_mark(text: str, final: str) -> str:
  mark = text.rfind(_CUT.strip())
  if mark < 0 or final.strip() not in text:
    raise DataError("the chat template leaves out parts of the final message, so that it cannot be continued")
  # A template that strips its messages has stripped the mark's space, and would have the text's own.
  return text[:mark] if text.startswith(_CUT, mark) else text[:mark].rstrip()


def marks_generation(template: str) -> bool:
  """Whether the template says itself, by {% generation %}, what an assistant writes."""
  return re.search(r"\{%[-+]?\s*generation\b", template) is not None


def _render(template: str, inputs: dict[str, Any], mark_generation: bool = False) -> str:
  if len(template) > MAX_TEMPLATE:
    raise DataError(f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE} make sense")
  marks = MARKS if mark_generation else ()
  try:
    return bounded.run(_PROGRAM, template, json.dumps([inputs, marks]))
  except bounded.Exceeded as error:
    raise DataError(f"the chat template is stopped: {error}") from None
  except bounded.Failed as error:
    kind, _, message = str(error).partition(": ")
    raise DataError(_SAYINGS.get(kind, f"the chat template fails with these messages: {kind}: ") + message) from None
