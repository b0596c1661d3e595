"""Which tokens are trained: by hand, as transformers says, and what cannot be trained as it should is refused."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from chat_templates import CHATML, GEMMA, LLAMA2, LLAMA3, MISTRAL, PHI3, QWEN3, ZEPHYR
from chat_tokenizer import chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.base.errors import DataError
from jaxllm.data.config import ChatConfig
from jaxllm.data.conversations import Conversation, Message, conversation_of
from jaxllm.data.masks import Masker
from jaxllm.data.show import marked_text
from jaxllm.data.tokenizers import SentencePieceTokenizer

TURNS = [
  {"role": "user", "content": "Hi"},
  {"role": "assistant", "content": "Hello"},
  {"role": "user", "content": "And?"},
  {"role": "assistant", "content": " It is\n\n4. \u4f60\U0001f600"},
]
SYSTEM = [{"role": "system", "content": "Be kind."}]
TOOL = [
  {"role": "user", "content": "2+2"},
  {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]},
  {"role": "tool", "content": "4"},
  {"role": "assistant", "content": "It is 4."},
]
THINKING = [
  {"role": "user", "content": "2+2"},
  {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
QWEN3_WITHOUT = re.sub(r"\{%- (end)?generation %\}", "", QWEN3)


@pytest.fixture(scope="module")
def shown(chat_tokenizer):
  """shown(template, messages): the conversation with its trained spans in [[brackets]]."""

  def shown(template, messages, tools=(), conversation=None, **config):
    tokenizer = chat_tokenizer(template)
    if conversation is None:
      conversation = conversation_of({"messages": messages, "tools": list(tools)})
    [(ids, weights)] = Masker(tokenizer, ChatConfig(**config))([conversation])
    assert ids.dtype == np.int32 and weights.dtype == np.float32 and len(ids) == len(weights)
    return marked_text(tokenizer, ids, weights)

  return shown


BY_HAND = {
  "chatml": (
    CHATML,
    SYSTEM + TURNS,
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "[[Hello<|im_end|>]]\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    "[[ It is\n\n4. \u4f60\U0001f600<|im_end|>]]\n",
  ),
  "llama3": (
    LLAMA3.replace("Today Date: ", "Date").replace(" + date_string", ""),
    TURNS,
    "<s><|start_header_id|>system<|end_header_id|>\n\nDate\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[[Hello<|eot_id|>]]<|start_header_id|>user"
    "<|end_header_id|>\n\nAnd?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "[[It is\n\n4. \u4f60\U0001f600<|eot_id|>]]",
  ),
  "gemma": (
    GEMMA,
    SYSTEM + TURNS,
    "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n[[Hello<end_of_turn>]]\n"
    "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n[[It is\n\n4. \u4f60\U0001f600<end_of_turn>]]\n",
  ),
  "mistral": (
    MISTRAL,
    TURNS,
    "<s>[INST] Hi[/INST][[ Hello</s>]][INST] And?[/INST][[ It is\n\n4. \u4f60\U0001f600</s>]]",
  ),
  "llama2": (
    LLAMA2,
    TURNS[:2],
    "<s>[INST] Hi [/INST][[ Hello </s>]]",
  ),
  "zephyr": (
    ZEPHYR,
    TURNS[:2],
    "<|user|>\nHi</s>\n<|assistant|>\n[[Hello</s>]]\n",
  ),
  "qwen3": (
    QWEN3,
    TURNS,
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello<|im_end|>]]\n<|im_start|>user\nAnd?<|im_end|>\n"
    "<|im_start|>assistant\n[[<think>\n\n</think>\n\n It is\n\n4. \u4f60\U0001f600<|im_end|>]]\n",
  ),
  "qwen3_thinking": (
    QWEN3_WITHOUT,
    THINKING,
    "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n[[<think>\nTwo and two.\n</think>\n\n4<|im_end|>]]\n",
  ),
  "qwen3_tools": (
    QWEN3,
    TOOL,
    "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    '[[\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>]]\n<|im_start|>user\n'
    "<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    "[[<think>\n\n</think>\n\nIt is 4.<|im_end|>]]\n",
  ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(shown, name):
  template, messages, want = BY_HAND[name]
  assert shown(template, messages) == want


TWINS = {  # {% generation %} around what a reply is, its end included
  "chatml": CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}",
  ),
  "mistral": MISTRAL.replace(
    '{{- " " + message["content"]|trim + eos_token}}',
    '{% generation %}{{- " " + message["content"]|trim + eos_token}}{% endgeneration %}',
  ),
  "qwen3": QWEN3.replace(
    "{%- endgeneration %}\n    {{- '<|im_end|>\\n' }}", "{{- '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
  ),
}  # fmt: skip


@pytest.mark.parametrize("turns", [TURNS, TURNS[:2], SYSTEM + TURNS, THINKING, TOOL], ids=range(5))
@pytest.mark.parametrize("name", TWINS)
def test_masks_are_those_of_transformers(chat_tokenizer, name, turns):
  transformers = pytest.importorskip("transformers")
  tokenizer = chat_tokenizer(TWINS[name])
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TWINS[name]
  )
  conversation = conversation_of({"messages": turns})
  try:
    [(ids, weights)] = Masker(tokenizer)([conversation])
  except DataError as error:  # what the template cannot say
    assert name != "qwen3" and re.search("fails|leaves out|refuses", str(error))
    return
  messages = [message.for_template() for message in conversation.messages]
  want = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
  assert ids.tolist() == want["input_ids"] and weights.tolist() == want["assistant_masks"]


@pytest.mark.parametrize("name", ["chatml", "mistral"])
def test_prefixes_find_what_generation_blocks_say(shown, name):
  plain = {"chatml": CHATML, "mistral": MISTRAL}[name]
  assert plain != TWINS[name] and shown(plain, TURNS) == shown(TWINS[name], TURNS)


CHATS = {"turns": TURNS, "system": SYSTEM + TURNS, "thinking": [*THINKING, *THINKING], "tools": TOOL}
KNOWN = {"qwen3": CHATS.keys(), "qwen2_5": CHATS.keys() - {"thinking"}, "gemma": {"turns"}}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3", "gemma", "gemma3"])
def test_templates_of_real_models(chat_tokenizer, name, chat):
  """As TRL ships them, with and without {% generation %} blocks."""
  transformers, trl = pytest.importorskip("transformers"), pytest.importorskip("trl")
  folder = Path(trl.__file__).parent / "chat_templates"
  marked, plain = ((folder / f"{stem}.jinja").read_text() for stem in (f"{name}_training", name))
  conversation = conversation_of({"messages": CHATS[chat]})
  tokenizer = chat_tokenizer(marked)
  if chat not in KNOWN.get(name, {"turns", "system"}):
    with pytest.raises(DataError, match="leaves out|refuses"):
      Masker(tokenizer)([conversation])
    return
  [(ids, weights)] = Masker(tokenizer)([conversation])
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>", chat_template=marked
  )
  messages = [message.for_template() for message in conversation.messages]
  want = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
  assert ids.tolist() == want["input_ids"] and weights.tolist() == want["assistant_masks"]
  if name == "qwen3":  # which writes all but the last turn otherwise when others follow
    with pytest.raises(DataError, match="not prefix-stable"):
      Masker(chat_tokenizer(plain))([conversation])
    return
  [(same, prefixes)] = Masker(chat_tokenizer(plain))([conversation])
  assert same.tolist() == ids.tolist()
  more = np.flatnonzero(weights != prefixes)  # TRL trains the line break behind the end of turn too
  assert set(tokenizer.decode(ids[more])) <= {"\n"} and (weights[more] == 1).all()


words = st.text(st.characters(codec="utf-8", exclude_characters="\ufdd0\ufdd1"), min_size=1, max_size=12)
replies = st.lists(words.filter(str.strip), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(texts=replies, template=st.sampled_from([CHATML, GEMMA, TWINS["chatml"], QWEN3, ZEPHYR]))
def test_trained_spans_are_the_replies_with_their_ends(chat_tokenizer, texts, template):
  tokenizer = chat_tokenizer(template)
  messages = [Message(role, text) for text in texts for role in ("user", "assistant")]
  [(ids, weights)] = Masker(tokenizer)([Conversation(tuple(messages))])
  edges = np.flatnonzero(np.diff(np.concatenate([[0], weights, [0]])))
  spans = [ids[start:stop].tolist() for start, stop in edges.reshape(-1, 2)]
  assert [span[-1] for span in spans] == [tokenizer.end_of_turn_id] * len(texts)
  got = [tokenizer.decode(span) for span in spans]
  got[-1] = got[-1].removeprefix("<think>\n\n</think>\n\n") if template == QWEN3 else got[-1]
  assert got == [text.strip() if template == GEMMA else text for text in texts]


def test_weights_and_what_is_trained(shown):
  start, end = "<|im_start|>", "<|im_end|>\n"
  user, reply = f"{start}user\nHi{end}{start}assistant\n", f"\n{start}user\nAnd?{end}{start}assistant\n"
  chat = [*TURNS[:3], {"role": "assistant", "content": "4"}]
  head = f"{start}system\nYou are helpful.{end}"
  weighted = [chat[0], chat[1] | {"weight": 0.5}, *chat[2:]]
  assert shown(CHATML, weighted) == f"{head}{user}[[0.5: Hello<|im_end|>]]{reply}[[4<|im_end|>]]\n"
  unread = [chat[0], chat[1] | {"train": False}, *chat[2:]]
  assert shown(CHATML, unread) == f"{head}{user}Hello<|im_end|>{reply}[[4<|im_end|>]]\n"
  assert shown(CHATML, chat, train_on="last") == f"{head}{user}Hello<|im_end|>{reply}[[4<|im_end|>]]\n"
  everything = shown(CHATML, chat, train_on="all")
  assert everything == f"{start}[[{(head + user).removeprefix(start)}Hello<|im_end|>{reply}4<|im_end|>\n]]"
  half = shown(CHATML, weighted, train_on="all")
  assert half == f"{start}[[{(head + user).removeprefix(start)}]][[0.5: Hello<|im_end|>]][[{reply}4<|im_end|>\n]]"
  prompt = conversation_of({"prompt": chat[:3], "completion": chat[3:]})
  assert shown(CHATML, None, conversation=prompt) == shown(CHATML, chat, train_on="last")
  assert shown(CHATML, None, conversation=prompt, train_on="all") == everything


def test_reasoning_and_tools_in_or_out(shown):
  before = "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
  thought = "<think>\nTwo and two.\n</think>\n\n"
  inside = [THINKING[0], {"role": "assistant", "content": f"{thought}4"}]
  for template in (QWEN3, QWEN3_WITHOUT):
    for chat in (THINKING, inside):
      assert shown(template, chat) == f"{before}[[{thought}4<|im_end|>]]\n"
      assert shown(template, chat, reasoning="mask") == f"{before}{thought}[[4<|im_end|>]]\n"
      assert shown(template, chat, reasoning="drop") == f"{before}[[<think>\n\n</think>\n\n4<|im_end|>]]\n"
    call = [THINKING[0], TOOL[1] | {"reasoning": "Two and two."}]
    assert shown(template, call, reasoning="mask").startswith(f"{before}<think>\nTwo and two.[[\n</think>")
  assert "[[<think>\nTwo and two." not in shown(QWEN3, THINKING, reasoning="mask", train_on="all")
  masked = shown(QWEN3, TOOL, tools=TOOLS, tool_calls="mask")
  assert masked.count("[[") == 1 and "[[<think>\n\n</think>\n\nIt is 4.<|im_end|>]]" in masked


@pytest.mark.parametrize("begin", ["<think>\n", ""])
def test_reasoning_in_the_text(shown, begin):
  """Which data of models has without its beginning, where that stands in the prompt for a reply."""
  chat = [TURNS[0], {"role": "assistant", "content": begin + "Two.\n</think>\n\n4"}]
  assert shown(CHATML, chat, reasoning="drop").endswith("assistant\n[[4<|im_end|>]]\n")
  assert shown(CHATML, chat, reasoning="mask").endswith(f"{begin}Two.\n</think>\n\n[[4<|im_end|>]]\n")
  cut = [TURNS[0], {"role": "assistant", "content": "<think>\nTwo."}]
  assert shown(CHATML, cut).endswith("[[<think>\nTwo.<|im_end|>]]\n")
  for reasoning in ("drop", "mask"):
    with pytest.raises(DataError, match="message 2 .assistant. has reasoning without an end"):
      shown(CHATML, cut, reasoning=reasoning)


def test_texts(shown, chat_tokenizer):
  def text(**row):
    return shown(None, None, conversation=conversation_of(row))

  assert text(prompt="The sky is", completion=" blue.") == "The sky is[[ blue.</s>]]"
  assert text(text="Once upon") == "O[[nce upon</s>]]"  # nothing predicts the first token
  conversation = conversation_of({"prompt": "a", "completion": "b"})
  assert shown(None, None, conversation=conversation, train_on="all") == "a[[b</s>]]"
  begins = chat_tokenizer(begins=True)
  [(ids, weights)] = Masker(begins)([conversation])
  assert marked_text(begins, ids, weights) == "<s>a[[b</s>]]"
  assert text(prompt="a", completion="b</s>") == "a[[b</s>]]"  # as TRL does


def test_several_tokens_and_blocks_end_a_reply(shown, chat_tokenizer):
  """Phi 3 writes EOS behind the end of the last turn, and TRL's copy of its template has a block for each."""
  trl = pytest.importorskip("trl")
  twin = (Path(trl.__file__).parent / "chat_templates" / "phi3_training.jinja").read_text()
  assert shown(PHI3, TURNS, train_on="last").endswith("[[ It is\n\n4. \u4f60\U0001f600<|end|>\n</s>]]")
  assert shown(twin, TURNS[:2]) == "<|user|>\nHi<|end|>\n<|assistant|>\n[[Hello<|end|>\n</s>]]"
  assert shown(twin, TURNS).count("[[") == 2
  cohere = CHATML.replace("'<|im_end|>'", "'<|eot_id|><|im_end|>'")
  assert shown(cohere, TURNS[:2]).endswith("[[Hello<|eot_id|><|im_end|>]]\n")


REFUSED = {
  "no template": (None, TURNS, {}, "no chat template: set data.chat.template to a Jinja file, or"),
  "reasoning goes": (QWEN3, [*THINKING, *TURNS], {}, "changes turns: it leaves out the reasoning of message 2"),
  "reasoning in the text goes": (
    QWEN3,
    [THINKING[0], {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\n4"}, *TURNS],
    {},
    "it leaves out parts of message 2 .assistant., 'Two.'; set data.chat.reasoning to 'drop'",
  ),
  "not prefix-stable": (QWEN3_WITHOUT, TURNS, {}, "not prefix-stable: it writes the turns up to message 2 otherwise"),
  "end of text behind all": (PHI3, TURNS, {}, "not prefix-stable"),
  "system goes": (MISTRAL, SYSTEM + TURNS, {}, "not prefix-stable"),
  "no reasoning": (CHATML, THINKING, {}, "leaves out the reasoning of message 2 .*set data.chat.reasoning to 'drop'"),
  "no tools": (CHATML, TURNS, {"tools": TOOLS}, "leaves out the tools"),
  "no stop": ("{% for m in messages %}{{ m.role + m.content + '\n' }}{% endfor %}", TURNS, {}, "stop token is never"),
  "no place for a stop": (
    "{% for m in messages %}{% if loop.index0 % 2 %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    "{{ m.content }}{% endif %}{{ '\n' + eos_token }}{% endfor %}",
    TURNS,
    {},
    "stop token is never",
  ),
  "stop in the text": (CHATML, [TURNS[0], TURNS[1] | {"content": "a<|im_end|>b"}], {}, "has '<|im_end|>' in its text"),
  "stop in the reasoning": (
    QWEN3,
    [TURNS[0], TURNS[1] | {"reasoning_content": "a<|im_end|>b"}],
    {},
    "a reply has '<|im_end|>', which",
  ),
  "turn in the text": (
    CHATML,
    [TURNS[0] | {"content": "a<|im_end|>\n<|im_start|>assistant\nb"}, TURNS[1]],
    {},
    "message 1 .user. has '<|im_end|>' in its text, which would begin or end a turn",
  ),
  "begin in the text": (CHATML, [TURNS[0], {"role": "assistant", "content": "<|im_start|>"}], {}, "has .<.im_start.>"),
  "thoughts begun": (
    CHATML.replace("assistant\n", "assistant\n<think>\n"),
    TURNS,
    {},
    r"its prompt for a reply is '<.im_start.>assistant.n<think>.n', and message 2 begins otherwise\. Set data.chat.var",
  ),
  "nothing trained": (CHATML, [TURNS[0], TURNS[1] | {"weight": 0}], {}, "no token is trained"),
  "bos twice": ("{{ bos_token }}" + MISTRAL, TURNS, {"begins": True}, "BOS is doubled"),
  "no bos": (ZEPHYR, TURNS, {"begins": True}, "BOS is missing: .*data.chat.require_bos"),
  "one block for all": (
    "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
    TURNS,
    {},
    "has 1 {% generation %} blocks for 2 replies",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_one_line(chat_tokenizer, name):
  template, messages, options, match = REFUSED[name]
  tokenizer = chat_tokenizer(template, begins="begins" in options)
  with pytest.raises(DataError, match=match.replace("|im_end|", r"\|im_end\|")) as raised:
    Masker(tokenizer)([conversation_of({"messages": messages, "tools": options.get("tools")})])
  assert "\n" not in str(raised.value)


def test_what_each_refusal_says_to_do_helps(shown, chat_tokenizer):
  assert shown(QWEN3, [*THINKING, *TURNS], reasoning="drop").count("[[") == 3
  inside = {"role": "assistant", "content": "<think>\nTwo.\n</think>\n\n4"}
  for chat in (TURNS, [*THINKING, *TURNS], [THINKING[0], inside, *TURNS]):
    assert shown(QWEN3_WITHOUT, chat, train_on="last").count("[[") == 1
  assert shown(CHATML, THINKING, reasoning="drop").count("[[") == 1
  tokenizer = chat_tokenizer(ZEPHYR, begins=True)
  assert Masker(tokenizer, ChatConfig(require_bos=False))([conversation_of({"messages": TURNS})])


def test_variables_reach_the_template(shown):
  quiet = shown(QWEN3_WITHOUT, THINKING[:1] + TURNS[1:2], variables={"enable_thinking": False})
  assert quiet.endswith("assistant\n<think>\n\n</think>\n\n[[Hello<|im_end|>]]\n")  # the empty thought is the prompt's


def test_a_token_across_the_edge_is_refused():
  import tokenizers

  from jaxllm.data.tokenizers import HuggingFaceTokenizer, byte_alphabet

  vocabulary = byte_alphabet() | {"\u0120b": 256}
  rust = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("\u0120", "b")]))
  rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  rust.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)  # as GPT-2's
  rust.decoder = tokenizers.decoders.ByteLevel()
  rust.add_special_tokens(["</s>"])
  tokenizer = HuggingFaceTokenizer(rust.to_str(), {"eos_token": "</s>"})
  [(ids, weights)] = Masker(tokenizer)([conversation_of({"prompt": "a", "completion": " b"})])
  assert marked_text(tokenizer, ids, weights) == "a[[ b</s>]]"
  with pytest.raises(DataError, match="joins the end of a prompt with the beginning of what follows"):
    Masker(tokenizer)([conversation_of({"prompt": "a ", "completion": "b"})])


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, tmp_path):
  """Llama 2's kind of tokenizer, whose pieces have no positions of their own."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["It is four. Hello there, and hello again [INST] [/INST]"] * 40),
    model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True, add_dummy_prefix=prefix,
    normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    hard_vocab_limit=False,
  )  # fmt: skip
  tokenizer = SentencePieceTokenizer(model.getvalue(), {"chat_template": LLAMA2})
  [(ids, weights)] = Masker(tokenizer)([conversation_of({"messages": TURNS})])
  assert ids.tolist() == tokenizer.encode_chat(tokenizer.render_chat(TURNS)).tolist()
  texts = []
  for start, stop in np.flatnonzero(np.diff(np.append(weights, 0))).reshape(-1, 2) + 1:
    assert ids[stop - 1] == tokenizer.eos_id
    texts.append(tokenizer.decode(ids[start:stop]))
  assert [text.strip() for text in texts] == ["Hello", "It is\n\n4. \u4f60\U0001f600"]


def test_reasoning_without_an_end_takes_no_square_of_its_length():
  spaces = Conversation((Message("user", "?"), Message("assistant", " " * 300_000 + "<think>")))  # hours, else
  with pytest.raises(DataError, match="reasoning without an end"):
    Masker(chat_tokenizer(), ChatConfig(reasoning="drop"))([spaces])
