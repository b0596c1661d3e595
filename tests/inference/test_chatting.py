"""Chatting with a model, in Python and at the terminal."""

import io
import sys

import pytest
import tiny_models as tiny

import jaxllm
from jaxllm.base.errors import ConfigError, DataError
from jaxllm.cli import run_door
from jaxllm.data.tokenizers import HuggingFaceTokenizer
from jaxllm.generate import main, reply
from jaxllm.inference.completions import Delta
from jaxllm.inference.model import Model
from jaxllm.inference.params import SamplingParams

TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
  "{% if add_generation_prompt %}a{% if loud %}!{% endif %}:{% endif %}"
)
GREEDY = dict(temperature=0, max_tokens=4, ignore_eos=True)
ARGV = ["--temperature=0", "--max-tokens=4", "--ignore-eos"]
BOS, EOS = tiny.BOS, tiny.EOS


def chat_model():
  plain = tiny.huggingface_bytes()
  tokenizer = HuggingFaceTokenizer(plain._definition, plain.settings | {"chat_template": TEMPLATE})
  model = tiny.loose_model()
  return Model(model.config, model.params, tokenizer)


@pytest.fixture(scope="module")
def model():
  return chat_model()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp("models") / "chat"
  chat_model().save(directory)
  return str(directory)


@pytest.fixture
def door(saved, capsys, monkeypatch):
  def run(*argv, stdin="", directory=saved):
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    code = run_door(main, [f"--model={directory}", *argv])
    out, err = capsys.readouterr()
    return code, out, err

  return run


def say(*contents):
  return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def answer(model, *contents, system=None):
  """The greedy reply, from ids written by hand."""
  ids = [BOS, *([] if system is None else [*b"s:", *system.encode(), EOS])]
  for n, content in enumerate(contents):
    ids += [*(b"u:", b"a:")[n % 2], *content.encode(), EOS]
  return model.generate([*ids, *b"a:"], **GREEDY)[0].text


def test_a_chat_is_its_templates_text(model):
  ids = model.chat_ids(say("hi", "yo", "ok"))
  assert ids == [BOS, *b"u:hi", EOS, *b"a:yo", EOS, *b"u:ok", EOS, *b"a:"]
  assert model.chat_ids(say("hi", "y"), continue_final_message=True) == [BOS, *b"u:hi", EOS, *b"a:y"]
  assert model.chat_ids(say("hi"), chat_template_kwargs={"loud": True})[-3:] == [*b"a!:"]
  completion = model.chat(say("hi"), **GREEDY)
  assert (completion.text, completion.prompt_tokens) == (answer(model, "hi"), 8)
  deltas = list(model.stream_chat(say("hi"), SamplingParams(**GREEDY)))
  assert "".join(delta.text for delta in deltas) == completion.text


def test_the_turns_end_ends_a_reply_whatever_the_files_say(model):
  free = model.chat(say("hi"), **GREEDY)
  other = chat_model()
  assert other.tokenizer.end_of_turn_id == EOS
  other.generation["eos_token_id"] = 5
  assert other.eos_ids == (5, EOS)
  last = free.token_ids[2]
  other.tokenizer.end_of_turn_id = last
  ended = other.chat(say("hi"), temperature=0, max_tokens=4)
  assert ended.token_ids == free.token_ids[: free.token_ids.index(last) + 1]
  assert ended.finish_reason == "stop"


def test_chats_that_cannot_be(model, saved):
  assert jaxllm.load_model(saved).tokenizer.chat_templates == {"default": TEMPLATE}
  with pytest.raises(ConfigError, match="the chat has 48 tokens, too many for the model's context of 48; leave out"):
    model.chat(say("x" * 42))
  with pytest.raises(DataError, match="no chat template; put one"):
    tiny.loose_model().chat(say("hi"))
  with pytest.raises(ConfigError, match="no tokenizer"):
    Model(model.config, model.params).chat(say("hi"))


def test_a_prompt_is_a_message(door, model):
  assert door("--prompt=hi", *ARGV)[:2] == (0, answer(model, "hi") + "\n")
  system = answer(model, "hi", system="be")
  assert door("--prompt=hi", "--system=be", "--echo", *ARGV)[1] == "hi" + system + "\n"
  raw = model.generate("hi", **GREEDY)[0].text
  assert door("--prompt=hi", "--raw", *ARGV)[1] == raw + "\n"
  first, second = answer(model, "hi"), answer(model, "yo")
  assert door("--prompt=hi", "--prompt=yo", *ARGV)[1] == f"--- prompt 1\n{first}\n--- prompt 2\n{second}\n"
  assert len({first, second, system, raw}) == 4


def test_a_chat_remembers_until_it_is_reset(door, model):
  first = answer(model, "hi")
  second = answer(model, "hi", first, "ok")
  code, out, err = door(*ARGV, stdin="hi\nok\n/reset\nhi\n/exit\nnever\n")
  assert (code, out) == (0, f"{first}\n{second}\n{first}\n")
  assert "a new chat" in err and second != answer(model, "ok")
  assert door("--system=be", *ARGV, stdin="hi\n/reset\nhi\n")[1] == 2 * (answer(model, "hi", system="be") + "\n")
  raw = [model.generate(line, **GREEDY)[0].text for line in ("hi", "/exit")]
  assert door("--raw", *ARGV, stdin="hi\n/exit\n")[1] == "\n".join(raw) + "\n"


def test_a_chat_that_outgrows_the_context_goes_on_when_reset(door, model):
  code, out, err = door(*ARGV, stdin="hi\n" + "x" * 40 + "\nhi\n/reset\nhi\n")
  first = answer(model, "hi")
  assert (code, out) == (2, f"{first}\n{answer(model, 'hi', first, 'hi')}\n{first}\n")
  assert "error: the chat has " in err and "start a new one (/reset does)\n" in err


def test_a_stopped_reply_stays_in_the_chat(capsys):
  class Stopped:
    def chat_ids(self, messages):
      return [1]

    def stream(self, ids, sampling):
      yield Delta(0, 0, "One, t", (1,))
      raise KeyboardInterrupt

  history = say("a", "b")
  with pytest.raises(KeyboardInterrupt):
    reply(Stopped(), history, "count", SamplingParams(), "")
  assert history == say("a", "b", "count", "One, t")
  assert capsys.readouterr().out == "One, t\n"


def test_what_only_a_chat_has(door, tmp_path):
  tiny.save(tmp_path / "plain")
  for argv, message in [
    (["--system=be", f"--model={tmp_path / 'plain'}", "--prompt=a"], "--system is for a chat"),
    (["--system=be", "--raw", "--prompt=a"], "--system is for a chat"),
    (["--num-samples=2"], "a chat goes on from one reply"),
  ]:
    code, out, err = door(*argv)
    assert (code, out) == (2, "") and err.startswith("error: ") and message in err and err.count("\n") == 1
