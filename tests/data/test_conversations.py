"""Every format of instruction data becomes one value, or one line that says what is wrong with the row."""

import json
import math
import re
from pathlib import Path

import pytest

from jaxllm.base.errors import ConfigError, DataError
from jaxllm.data.config import SourceConfig
from jaxllm.data.conversations import (
  Conversation,
  Message,
  Preference,
  conversation_of,
  from_json,
  preference_of,
  to_json,
)

SYSTEM, USER, REPLY = Message("system", "Be kind."), Message("user", "2+2?"), Message("assistant", "4")
AGAIN, LAST = Message("user", "Sure?"), Message("assistant", "Yes.")
ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CALL = Message("assistant", tool_calls=(ADD,))
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {}}},)


def openai(*messages):
  return [{k: v for k, v in vars(message).items() if v} | {"content": message.content} for message in messages]


CHATS = {
  "alpaca": ({"instruction": "2+2?", "input": "", "output": "4"}, Conversation((USER, REPLY))),
  "alpaca_all": (
    {"instruction": "Sum:", "input": "2+2", "output": "4", "system": "Be kind.", "history": [["2+2?", "4"]]},
    Conversation((SYSTEM, USER, REPLY, Message("user", "Sum:\n2+2"), REPLY)),
  ),
  "sharegpt": (
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "system": "Be kind."},
    Conversation((SYSTEM, USER, REPLY)),
  ),
  "sharegpt_tools": (
    {
      "conversations": [
        {"from": "human", "value": "2+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "4"},
      ],
      "tools": '[{"type": "function", "function": {"name": "add", "parameters": {}}}]',
    },
    Conversation((USER, CALL, Message("tool", "4"), REPLY), TOOLS),
  ),
  "openai": ({"messages": openai(SYSTEM, USER, REPLY, AGAIN, LAST)}, Conversation((SYSTEM, USER, REPLY, AGAIN, LAST))),
  "openai_tools": (
    {
      "messages": [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
        {
          "role": "assistant",
          "content": None,
          "reasoning": " Add them. ",
          "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
          ],
        },
        {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "4", "weight": 0.5},
      ],
      "tools": list(TOOLS),
    },
    Conversation(
      (
        SYSTEM,
        USER,
        Message("assistant", reasoning="Add them.", tool_calls=({"id": "c1"} | ADD,), silent=True),
        Message("tool", "4", tool_call_id="c1", name="add"),
        Message("assistant", "4", weight=0.5),
      ),
      TOOLS,
    ),
  ),
  "texts": (
    {"prompt": "2+2=", "completion": "4"},
    Conversation((Message("text", "2+2="), Message("text", "4")), (), 1),
  ),
  "prompt_messages": (
    {"prompt": openai(SYSTEM, USER, REPLY, AGAIN), "completion": openai(LAST)},
    Conversation((SYSTEM, USER, REPLY, AGAIN, LAST), (), 4),
  ),
  "prompt_mixed": ({"prompt": "2+2?", "completion": openai(REPLY)}, Conversation((USER, REPLY), (), 1)),
  "text": ({"text": "Once"}, Conversation((Message("text", "Once"),))),
}


@pytest.mark.parametrize("name", CHATS)
def test_conversations(name):
  row, want = CHATS[name]
  assert conversation_of(row) == want
  assert from_json(to_json(want)) == want
  other = {"prompt": None, "chosen": None, "text": None} | row | {"id": 7, "source": "x"}  # as Arrow fills tables
  assert conversation_of(other) == want


PAIR = Preference((USER,), (REPLY,), (LAST,))
PREFERENCES = {
  "explicit": ({"prompt": openai(USER), "chosen": openai(REPLY), "rejected": openai(LAST)}, PAIR),
  "implicit": ({"chosen": openai(USER, REPLY), "rejected": openai(USER, LAST)}, PAIR),
  "prompt_twice": ({"prompt": "2+2?", "chosen": openai(USER, REPLY), "rejected": openai(USER, LAST)}, PAIR),
  "prompt_lists_twice": (
    {"prompt": openai(USER), "chosen": openai(USER, REPLY), "rejected": openai(USER, LAST)},
    PAIR,
  ),
  "question": ({"prompt": "2+2?", "chosen": openai(REPLY), "rejected": openai(LAST)}, PAIR),
  "alpaca": ({"instruction": "2+2?", "chosen": "4", "rejected": "Yes."}, PAIR),
  "sharegpt": (
    {
      "conversations": [{"from": "human", "value": "2+2?"}],
      "chosen": {"from": "gpt", "value": "4"},
      "rejected": {"from": "gpt", "value": "Yes."},
    },
    PAIR,
  ),
  "turns": (
    {"chosen": openai(USER, REPLY, AGAIN, LAST), "rejected": openai(USER, REPLY, AGAIN, REPLY), "system": "Be kind."},
    Preference((SYSTEM, USER, REPLY, AGAIN), (LAST,), (REPLY,)),
  ),
  "other_turns": (
    {"chosen": openai(USER, REPLY, AGAIN, LAST), "rejected": openai(USER, LAST)},
    Preference((USER,), (REPLY, AGAIN, LAST), (LAST,)),
  ),
  "texts": (
    {"prompt": "Sky:", "chosen": " blue", "rejected": " black"},
    Preference(*((Message("text", text),) for text in ("Sky:", " blue", " black"))),
  ),
  "implicit_texts": (
    {"chosen": "Q: sky?\n\nA: It is blue", "rejected": "Q: sky?\n\nA: It is black"},
    Preference(*((Message("text", text),) for text in ("Q: sky?\n\nA: It is", " blue", " black"))),
  ),
  "implicit_prefix": (
    {"chosen": "It is blue", "rejected": "It is"},
    Preference(*((Message("text", text),) for text in ("It", " is blue", " is"))),
  ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name):
  row, want = PREFERENCES[name]
  assert preference_of(row) == want
  assert from_json(to_json(want)) == want


@pytest.mark.parametrize("user, reply", [("Human", "GPT"), ("USER", "Assistant"), ("human", "bard"), ("user", "ai")])
def test_names_of_roles(user, reply):
  chat = [{"from": user, "value": "2+2?"}, {"from": reply, "value": "4"}]
  assert conversation_of({"conversations": chat}) == Conversation((USER, REPLY))


def test_openais_older_calls():
  call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
  answer = {"role": "function", "name": "f", "content": "4"}
  found = conversation_of({"messages": [*openai(USER), call, answer, *openai(REPLY)], "functions": [{"name": "f"}]})
  assert found.messages[1].tool_calls == ({"type": "function", "function": {"name": "f", "arguments": {"a": 1}}},)
  assert found.tools == ({"name": "f"},)
  # A template may tell no content from an empty one.
  for content in (None, "", "x"):
    row = {"messages": [*openai(USER), call | {"content": content}, answer, *openai(REPLY)]}
    assert conversation_of(row).messages[1].for_template()["content"] == content


def test_columns_and_keys_are_mapped():
  row = {"question": "2+2?", "answer": "4", "prompt": "no", "completion": "no"}
  columns = {"instruction": "question", "output": "answer"}
  assert conversation_of(row, "alpaca", columns) == Conversation((USER, REPLY))
  assert conversation_of(row, "prompt_completion", {"prompt": "question", "completion": "answer"}).prompt == 1
  chat = {"dialog": [{"who": "human", "said": "2+2?"}, {"who": "bot", "said": "4"}]}
  keys = {"messages": "dialog", "role": "who", "content": "said"}
  assert conversation_of(chat, "openai", keys) == conversation_of(chat, "auto", keys) == Conversation((USER, REPLY))
  pair = {"q": "2+2?", "good": "4", "bad": "Yes."}
  assert preference_of(pair, "alpaca", {"instruction": "q", "chosen": "good", "rejected": "bad"}) == PAIR
  texts = {"prompt": "2+2?", "chosen": "4", "rejected": "Yes."}  # put into the template by what they are called
  assert preference_of(texts, "auto", {"instruction": "prompt"}) == PAIR
  with pytest.raises(DataError, match="no column 'q', which the source's `columns` names; it has: text"):
    conversation_of({"text": "x"}, "auto", {"instruction": "q"})
  with pytest.raises(ConfigError, match="has the key 'anwser'; standard names are instruction, "):
    SourceConfig(columns={"anwser": "a"})


BAD = {
  "no_object": (["x"], "a JSON object is needed, this is list"),
  "no_format": (
    {"question": "x"},
    "no format has the columns question; one of messages, .* set the source's `columns`",
  ),
  "empty_output": ({"instruction": "x", "output": " "}, "column 'output' must be text that is not empty"),
  "no_output": ({"instruction": "x"}, "no column 'output'; it has: instruction"),
  "history": ({"instruction": "x", "output": "y", "history": ["q", "a"]}, "history is a list of pairs"),
  "no_list": ({"messages": 5}, "a conversation is a list of messages"),
  "no_messages": ({"messages": []}, "a conversation is a list of messages"),
  "role": ({"messages": [{"role": "narrator", "content": "x"}]}, "message 1 has the role 'narrator'; known are system"),
  "role_list": ({"messages": [{"role": ["user"], "content": "x"}]}, r"message 1 has the role \['user'\]; known are"),
  "no_reasoning": (
    {"messages": openai(USER) + [{"role": "assistant", "content": "4", "reasoning": ["x"]}]},
    r"message 2 \(assistant\) has reasoning that is no text",
  ),
  "blank": (
    {"messages": openai(USER) + [{"role": "assistant", "content": " \n"}]},
    r"message 2 \(assistant\) has no text",
  ),
  "no_calls": ({"messages": openai(USER) + [{"role": "assistant", "tool_calls": 5}]}, "message 2's tool_calls are no"),
  "no_function": ({"messages": openai(USER, REPLY), "tools": [{"function": "x"}]}, "tools is a list of JSON schemas"),
  "history_number": ({"instruction": "x", "output": "y", "history": 5}, "history is a list of pairs"),
  "history_blank": ({"instruction": "x", "output": "y", "history": [["q", ""]]}, "of texts that are not empty"),
  "system_beside_texts": ({"prompt": "x", "completion": "y", "system": "z"}, "'system' has no place beside texts"),
  "tools_beside_texts": ({"prompt": "x", "completion": "y", "tools": [{}]}, "'tools' has no place beside texts"),
  "image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1 has parts that are no text"),
  "empty": (
    {"messages": openai(USER) + [{"role": "assistant", "content": ""}]},
    r"message 2 \(assistant\) has no text",
  ),
  "two_users": (
    {"messages": openai(USER, USER, REPLY)},
    "out of order: message 2 is user's, where user is followed by assi",
  ),
  "reply_first": ({"messages": openai(REPLY, USER)}, "out of order: message 1 is assistant's, where the beginning is"),
  "late_system": ({"messages": openai(USER, REPLY, SYSTEM)}, "out of order: message 3 is system's"),
  "tool_alone": ({"messages": openai(USER, Message("tool", "4"))}, "out of order: message 2 is tool's"),
  "call_unanswered": (
    {"messages": openai(USER, CALL, AGAIN)},
    "out of order: message 3 is user's, where a tool call is",
  ),
  "no_reply": ({"messages": openai(USER, REPLY, AGAIN)}, "the last message is user's"),
  "arguments": (
    {"messages": openai(USER) + [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{a"}]}]},
    "the arguments of message 2's tool call is not JSON: '{a'",
  ),
  "call": (
    {"messages": openai(USER) + [{"role": "assistant", "tool_calls": ["f"]}]},
    "message 2 has a tool call that is",
  ),
  "tools": ({"messages": openai(USER, REPLY), "tools": "x"}, "tools is not JSON: 'x'"),
  "weight": (
    {"messages": openai(USER, REPLY)[:1] + [{"role": "assistant", "content": "4", "weight": -1}]},
    "weight -1",
  ),
  **{
    f"weight_{weight}": (
      {"messages": openai(USER) + [{"role": "assistant", "content": "4", "weight": weight}]},
      rf"message 2 \(assistant\) has the weight {weight}",
    )
    for weight in (math.nan, math.inf)
  },
  "user_weight": (
    {"messages": [openai(USER)[0] | {"weight": 1}, *openai(REPLY)]},
    r"message 1 \(user\) has the weight 1",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_one_line(name):
  row, match = BAD[name]
  with pytest.raises(DataError, match=match) as raised:
    conversation_of(row)
  assert "\n" not in str(raised.value)


BAD_PAIRS = {
  "same": ({"prompt": "x", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
  "same_messages": (
    {"chosen": openai(USER, REPLY), "rejected": openai(USER, REPLY)},
    "chosen and rejected are the same",
  ),
  "same_parsed": (
    {"chosen": openai(USER, REPLY), "rejected": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "chosen and rejected are the same",
  ),
  "missing": ({"prompt": "x", "chosen": "a"}, "no column 'rejected'; it has: prompt, chosen"),
  "empty": ({"prompt": "x", "chosen": "a", "rejected": ""}, "chosen or rejected has no text"),
  "blank": ({"prompt": "x", "chosen": "a", "rejected": " "}, "chosen or rejected has no text"),
  "no_instruction": ({"instruction": "", "chosen": "a", "rejected": "b"}, "column 'instruction' must be text"),
  "system_beside_texts": (
    {"prompt": "x", "chosen": "a", "rejected": "b", "system": "z"},
    "column 'system' has no place beside texts, .* map the prompt to 'instruction'",
  ),
  "unasked": ({"chosen": openai(REPLY), "rejected": openai(LAST)}, "out of order: message 1 is assistant's"),
  "unanswered": ({"chosen": openai(USER, REPLY), "rejected": openai(USER, REPLY, AGAIN)}, "the last message is user's"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs_are_one_line(name):
  row, match = BAD_PAIRS[name]
  with pytest.raises(DataError, match=match):
    preference_of(row)


def test_a_prompts_replies_have_no_weight_in_a_pair():
  first = openai(USER) + [{"role": "assistant", "content": "4", "weight": 1.0}, *openai(AGAIN)]
  sides = preference_of({"prompt": first, "chosen": openai(REPLY), "rejected": openai(LAST)}).sides
  assert [[m.weight for m in side.messages] for side in sides] == [[None] * 4] * 2


def test_text_that_is_no_utf8():
  with pytest.raises(DataError, match="neither UTF-8 text nor JSON"):
    to_json(conversation_of({"text": "caf\udce9"}))


def test_the_examples_of_the_documentation():
  page = (Path(__file__).parents[2] / "docs" / "instruction_data.md").read_text(encoding="utf-8")
  rows = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)]
  chats = [conversation_of(row) for row in rows if "chosen" not in row]
  pairs = [preference_of(row) for row in rows if "chosen" in row]
  assert len(chats) == 6 and len(pairs) == 4
  assert [len(chat.messages) for chat in chats] == [2, 2, 4, 2, 2, 1]
  assert [pair.chosen[0].content for pair in pairs] == ["4", "4", "4", " blue."]
  assert len({pair.prompt for pair in pairs}) == 2


def test_odd_rows_take_no_square_of_their_length():
  """Hours, where a pattern tries every place as a beginning."""
  row = {"chosen": "a" * 300_000 + " b", "rejected": "a" * 300_000 + " c"}
  assert preference_of(row).prompt[0].content == "a" * 300_000
  assert preference_of({"chosen": "one two x", "rejected": "one twist"}).prompt[0].content == "one"
