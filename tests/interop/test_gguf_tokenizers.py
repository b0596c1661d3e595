"""Tokenizers through GGUF metadata. What llama.cpp itself makes of them, tools/check_gguf.py shows."""

import json

import gguf_models
import numpy as np
import pytest
import tokenizers
from gguf_models import TEXT

from jaxllm.base.errors import CheckpointError, DataError
from jaxllm.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, as_huggingface, load_tokenizer
from jaxllm.interop.gguf import GgufCheckpoint, read_gguf, write_gguf
from jaxllm.interop.gguf.tokenizer import CONTROL, PRE_TOKENIZERS, USER_DEFINED, special_ids
from jaxllm.interop.gguf.tokenizer_write import tokenizer_metadata

TEXTS = [
  *(
    "Hello world",
    "  two  spaces",
    "a\n\n\tb \r\n",
    "x = 12345 + 6.78",
    "I'LL don't we've",
    "世界，你好！",
    "日本語 한국어",
  ),
  *("🙂👩\u200d👧🇫🇷", "def f(x):\n    return x**2  # ok", "naïve Größe e\u0301 ½ ٣٤", "<|end|> <s> </s>", "", " "),
]
SPECIAL = ["<|start|>", "<|end|>"]
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def byte_level(pre):
  """A byte-level BPE tokenizer, trained by the `tokenizers` library with the pre-tokenizer that `pre` names."""
  split = [
    tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS.get(pre, ())
  ]
  level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*split, level])
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=310, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
  )
  tokenizer.train_from_iterator([TEXT] * 3, trainer)
  tokenizer.add_tokens([tokenizers.AddedToken("<br>", normalized=False)])
  settings = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": "{{ messages[0]['content'] }}"}
  return HuggingFaceTokenizer(tokenizer.to_str(), settings)


def through_file(tmp_path, tokenizer, generation=None):
  hf, tensors = gguf_models.checkpoint("llama")
  write_gguf(tmp_path / "x.gguf", hf, tensors, tokenizer, generation=generation)
  return read_gguf(tmp_path / "x.gguf")


def alike(a, b):
  assert (a.vocab_size, a.bos_id, a.eos_id) == (b.vocab_size, b.bos_id, b.eos_id)
  for text in [*TEXTS, "".join(TEXTS), b"\xff\xfe text \xe4\xb8"]:
    ids = a.encode(text)
    np.testing.assert_array_equal(ids, b.encode(text), err_msg=repr(text))
    assert a.decode_bytes(ids) == b.decode_bytes(ids)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_bpe(tmp_path, pre):
  tokenizer = byte_level(pre)
  back = through_file(tmp_path, tokenizer)
  assert back.metadata["tokenizer.ggml.pre"] == pre
  types = back.metadata["tokenizer.ggml.token_type"]
  assert types[0] == CONTROL and types[tokenizer.encode("<br>")[0]] == USER_DEFINED
  alike(tokenizer, back.tokenizer())
  assert back.tokenizer().chat_templates == tokenizer.chat_templates
  prompt = "<|start|>hi<br><|end|>"
  np.testing.assert_array_equal(back.tokenizer().encode_chat(prompt), tokenizer.encode_chat(prompt))


def test_pre_tokenizers_are_those_of_the_models():
  """As `transformers` cuts text for the models that the names stand for."""
  transformers = pytest.importorskip("transformers")
  from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

  assert PRE_TOKENIZERS["qwen2"] == (PRETOKENIZE_REGEX,)
  gpt2 = transformers.GPT2Tokenizer(vocab={"a": 0}, merges=[])
  ours = byte_level("gpt-2")._tokenizer.pre_tokenizer
  for text in TEXTS:
    assert gpt2.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) == ours.pre_tokenize_str(text)


def test_digits_are_single_pieces_for_smollm():
  """SmolLM2's tokenizer.json cuts with Digits, which is the pattern that llama.cpp has for "smollm"."""
  ours = byte_level("smollm")._tokenizer.pre_tokenizer
  theirs = tokenizers.pre_tokenizers.Sequence(
    [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  for text in TEXTS:
    assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "sentencepiece_unigram"])
def test_sentencepiece(tmp_path, request, kind):
  tokenizer = request.getfixturevalue(kind)
  back = through_file(tmp_path, tokenizer)
  assert back.metadata["tokenizer.ggml.model"] == ("t5" if "unigram" in kind else "llama")
  assert len(back.metadata["tokenizer.ggml.tokens"]) == gguf_models.VOCAB  # filled up to the embedding
  again = back.tokenizer()
  alike(tokenizer, again)
  assert (again.unk_id, again.pad_id) == (tokenizer.unk_id, tokenizer.pad_id)
  assert back.generation["add_bos_token"] is True and back.generation["add_eos_token"] is False


def test_sentencepiece_with_a_dummy_prefix_and_symbols_of_spaces():
  import io

  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXT.splitlines() * 5), model_writer=model, model_type="bpe", vocab_size=360,
    byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
    user_defined_symbols=["\u2581\u2581", "<turn>"], pad_id=3, minloglevel=3,
  )  # fmt: skip
  tokenizer = SentencePieceTokenizer(model.getvalue())
  metadata = tokenizer_metadata(tokenizer, 400, {})
  at = [i for i, t in enumerate(metadata["tokenizer.ggml.token_type"]) if t == USER_DEFINED]
  assert [metadata["tokenizer.ggml.tokens"][i] for i in at] == ["  ", "<turn>"]  # as they stand in text
  alike(tokenizer, GgufCheckpoint({}, {}, metadata).tokenizer())


def test_generation_settings(tmp_path, sentencepiece_bpe):
  given = {"eos_token_id": [2, 7], "bos_token_id": 1}
  settings = sentencepiece_bpe.settings | {"chat_template": "{{ bos_token }}", "add_bos_token": False}
  back = through_file(tmp_path, SentencePieceTokenizer(sentencepiece_bpe.model, settings), given)
  assert {key: back.generation[key] for key in given} == given and not back.generation["add_bos_token"]
  assert back.tokenizer().chat_templates["default"] == "{{ bos_token }}"
  np.testing.assert_array_equal(back.tokenizer().encode_prompt("add"), sentencepiece_bpe.encode("add"))


def framed(single):
  """A byte-level tokenizer with a template for what it puts around a text."""
  definition = json.loads(byte_level("llama-bpe")._definition)
  rust = tokenizers.Tokenizer.from_str(json.dumps(definition))
  if single is not None:
    known = [(token, rust.token_to_id(token)) for token in SPECIAL]
    rust.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=known)
  return rust


@pytest.mark.parametrize(
  ("single", "settings", "flags"),
  [
    (None, {"bos_token": "<|start|>"}, (False, False)),  # as SmolLM2, whose file has no template
    (None, {"bos_token": "<|start|>", "add_bos_token": True}, None),
    (None, {"add_bos_token": False}, (False, False)),
    ("<|start|> $A", {"bos_token": "<|start|>"}, (True, False)),
    ("<|start|> $A <|end|>", {"bos_token": "<|start|>"}, (True, True)),
    ("$A <|end|>", {}, (False, True)),
  ],
)
def test_prompts_begin_and_end_as_transformers_has_them(tmp_path, single, settings, flags):
  transformers = pytest.importorskip("transformers")
  tokenizer = HuggingFaceTokenizer(framed(single).to_str(), {"eos_token": "<|end|>", **settings})
  tokenizer.save(tmp_path / "files")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "files")
  back = through_file(tmp_path, load_tokenizer(tmp_path / "files"))
  says = tuple(back.metadata[f"tokenizer.ggml.add_{role}_token"] for role in ("bos", "eos"))
  assert flags is None or says == flags
  for text in ("hello", " two  spaces", "<|start|>hi"):
    assert back.tokenizer().encode_prompt(text).tolist() == theirs(text).input_ids


def test_a_frame_of_other_tokens_is_refused():
  tokenizer = HuggingFaceTokenizer(framed("<|start|> <|end|> $A").to_str(), {"eos_token": "<|end|>"})
  with pytest.raises(DataError, match="puts <.start.> <.end.> before a text and nothing behind it"):
    tokenizer_metadata(tokenizer, 320, {})


def test_ends_are_those_of_the_generation_config_and_the_template():
  template = "{% for m in messages %}{{ m['content'] }}<|start|>{% endfor %}"
  tokenizer = byte_level("gpt-2").with_settings({"eos_token": "<|end|>", "chat_template": template})
  metadata = tokenizer_metadata(tokenizer, 320, {"eos_token_id": [1, 300]})
  says = {role: metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot", "eom")}
  assert says == {"eos": 1, "eot": 0, "eom": 300}
  assert special_ids(metadata)["eos_token_id"] == [1, 0, 300]


def test_named_templates_come_back():
  templates = [{"name": name, "template": f"{{# {name} #}}"} for name in ("default", "tool_use", "rag")]
  tokenizer = byte_level("gpt-2").with_settings({"eos_token": "<|end|>", "chat_template": templates})
  metadata = tokenizer_metadata(tokenizer, 320, {})
  assert metadata["tokenizer.chat_template.tool_use"] == "{# tool_use #}"
  assert GgufCheckpoint({}, {}, metadata).tokenizer().chat_templates == tokenizer.chat_templates


def test_what_only_some_texts_show_is_said(caplog, sentencepiece_bpe):
  definition = json.loads(byte_level("gpt-2")._definition)
  definition["normalizer"] = {"type": "NFC"}
  definition["added_tokens"][0]["rstrip"] = True
  tokenizer_metadata(HuggingFaceTokenizer(json.dumps(definition), {"eos_token": "<|end|>"}), 320, {})
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == 2 and "(NFC)" in said[0] and "rstrip of added tokens ('<|start|>')" in said[1]


def characters_with_bytes(tokenizer, prefix):
  """A SentencePiece model as the tokenizer.json of Llama 2 (`prefix`) and of Gemma spell one."""
  definition = json.loads(as_huggingface(tokenizer)._definition)
  model, space = definition["model"], "\u2581"
  model["vocab"] = {token.replace(" ", space): i for token, i in model["vocab"].items()}
  model["merges"] = [[part.replace(" ", space) for part in pair] for pair in model["merges"]]
  steps = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": space}, REPLACE]}
  cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
  definition |= {"normalizer": steps if prefix else REPLACE, "pre_tokenizer": None if prefix else cut}
  definition["decoder"] = {"type": "Sequence", "decoders": [replace_back := dict(REPLACE), {"type": "ByteFallback"}]}
  definition["decoder"]["decoders"] += [{"type": "Fuse"}]
  replace_back.update(pattern={"String": space}, content=" ")
  return definition


@pytest.mark.parametrize("prefix", [True, False])
def test_bpe_with_byte_fallback(tmp_path, sentencepiece_bpe, prefix):
  definition = characters_with_bytes(sentencepiece_bpe, prefix)
  tokenizer = HuggingFaceTokenizer(json.dumps(definition), {"bos_token": "<s>", "eos_token": "</s>"})
  back = through_file(tmp_path, tokenizer)
  assert back.metadata["tokenizer.ggml.model"] == "llama"
  assert back.metadata["tokenizer.ggml.add_space_prefix"] is prefix
  for text in [*TEXTS, "".join(TEXTS), TEXT]:
    if text:  # SentencePiece makes nothing of nothing, with a prefix too
      np.testing.assert_array_equal(back.tokenizer().encode(text), tokenizer.encode(text), err_msg=repr(text))


@pytest.mark.parametrize(
  ("merges", "normalizer", "words"),
  [
    (("a b", "ab c", "b c", "a bc"), REPLACE, "make 'abc' at different ranks"),
    (("a b", "b c", "ab c"), REPLACE, "no merge for some parts of 'abc'"),
    (
      ("a b", "b c", "ab c", "a bc"),
      {"type": "Sequence", "normalizers": [REPLACE, {"type": "NFC"}]},
      "what llama.cpp cannot",
    ),
    (("a b", "b c", "ab c", "a bc"), None, "does not write spaces as"),
    (("a b", "b c", "ab c", "a bc"), REPLACE, None),
  ],
)
def test_bpe_that_is_not_by_pieces(merges, normalizer, words):
  vocab = {piece: i for i, piece in enumerate(("<unk>", "</s>", "a", "b", "c", "ab", "bc", "abc"))}
  rust = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
  rust.add_special_tokens(["<unk>", "</s>"])
  definition = json.loads(rust.to_str()) | {"normalizer": normalizer}
  definition["model"]["merges"] = [merge.split() for merge in merges]
  tokenizer = HuggingFaceTokenizer(json.dumps(definition), {"eos_token": "</s>"})
  if words is None:
    scores = tokenizer_metadata(tokenizer, 10, {})["tokenizer.ggml.scores"]
    assert scores[5:8].tolist() == [0, -1, -2]
  else:
    with pytest.raises(DataError, match=words):
      tokenizer_metadata(tokenizer, 10, {})


def wordpiece(lowercase, strip_accents=None):
  """BERT's, trained on TEXT."""
  tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=lowercase, strip_accents=strip_accents)
  tokenizer.train_from_iterator([TEXT] * 3, vocab_size=300, show_progress=False)
  tokenizer.post_processor = tokenizers.processors.BertProcessing(
    *((token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]"))
  )
  return HuggingFaceTokenizer(tokenizer.to_str())


@pytest.mark.parametrize(("lowercase", "strip"), [(True, None), (False, None), (False, True)])
def test_wordpiece(tmp_path, lowercase, strip):
  tokenizer = wordpiece(lowercase, strip)
  back = through_file(tmp_path, tokenizer)
  pieces = back.metadata["tokenizer.ggml.tokens"]
  assert (
    back.metadata["tokenizer.ggml.model"] == "bert" and "[CLS]" in pieces and not any("##" in x for x in pieces[5:])
  )
  roles = {role: token for role, token in tokenizer.special_tokens.items() if role != "eos_token"}
  assert back.tokenizer().special_tokens == roles  # BERT's class has no end
  for text in TEXTS:
    np.testing.assert_array_equal(back.tokenizer().encode_prompt(text), tokenizer.encode_prompt(text))
    for a, b in zip(back.tokenizer().encode_pair(text, "and"), tokenizer.encode_pair(text, "and")):
      np.testing.assert_array_equal(a, b)


def test_wordpiece_that_llama_cpp_cannot_follow():
  definition = json.loads(wordpiece(True)._definition)
  for change, words in (
    ({"pre_tokenizer": {"type": "Whitespace"}}, "cuts or cleans text in another way"),
    ({"post_processor": None}, "one token before a text and one behind it"),
  ):
    with pytest.raises(DataError, match=words):
      tokenizer_metadata(HuggingFaceTokenizer(json.dumps(definition | change)), 310, {})


# Of characters that are pieces, with spaces but at the end: transformers has a piece for one there.
KNOWN = ["The quick brown fox", "  Adds two   numbers", "first + second", "jumps over the lazy dog. Größe"]


def unigram(sentencepiece_unigram):
  """SentencePiece's as XLM-RoBERTa's tokenizer.json spells one."""
  definition = json.loads(as_huggingface(sentencepiece_unigram)._definition)
  definition["normalizer"] = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
  space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
  definition |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]}}
  definition["model"]["byte_fallback"] = False  # which llama.cpp has not
  definition["model"]["vocab"] = [[x.replace(" ", "\u2581"), score] for x, score in definition["model"]["vocab"]]
  rust = tokenizers.Tokenizer.from_str(json.dumps(definition | {"decoder": space}))
  ends = [(token, rust.token_to_id(token)) for token in ("<s>", "</s>")]
  rust.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
  )
  return HuggingFaceTokenizer(rust.to_str(), {"bos_token": "<s>", "eos_token": "</s>"})


def test_unigram_of_tokenizer_json(tmp_path, sentencepiece_unigram):
  tokenizer = unigram(sentencepiece_unigram)
  back = through_file(tmp_path, tokenizer)
  assert back.metadata["tokenizer.ggml.model"] == "t5" and back.metadata["tokenizer.ggml.remove_extra_whitespaces"]
  assert back.metadata["tokenizer.ggml.add_sep_token"]
  assert back.metadata["tokenizer.ggml.seperator_token_id"] == tokenizer.eos_id
  for text in KNOWN:
    assert back.tokenizer().encode_prompt(text).tolist() == tokenizer.encode_prompt(text).tolist(), text


def test_tokens_that_end_a_turn_are_ends():
  metadata = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "a"],
    "tokenizer.ggml.token_type": np.array([3, 3, 1, 1], np.int32),
    "tokenizer.ggml.eos_token_id": 0,
  }
  assert special_ids(metadata)["eos_token_id"] == [0, 1]  # a plain token of that spelling is text
  with pytest.raises(CheckpointError, match="eos_token_id is 4, not a token's id"):
    special_ids(metadata | {"tokenizer.ggml.eos_token_id": 4})


def test_no_tokenizer(tmp_path):
  back = through_file(tmp_path, None)
  assert back.tokenizer() is None


@pytest.mark.parametrize(
  ("key", "value", "words"),
  [
    ("model", "rwkv", "kind 'rwkv'"),
    ("pre", "kimi-k2", "cuts text as 'kimi-k2'"),
    ("tokens", ["a", "a"], "names a token twice"),
    ("token_type", np.array([1], np.int32), "does not fit its tokens"),
    ("merges", ["q zz"], "make no tokenizer"),
    ("merges", None, "lacks tokenizer.ggml.merges"),
  ],
)
def test_metadata_that_make_no_tokenizer(key, value, words):
  metadata = tokenizer_metadata(byte_level("gpt-2"), 320, {})
  metadata[f"tokenizer.ggml.{key}"] = value
  if value is None:
    del metadata[f"tokenizer.ggml.{key}"]
  with pytest.raises(CheckpointError, match=words):
    GgufCheckpoint({}, {}, metadata).tokenizer()


def test_tokenizers_that_llama_cpp_cannot_follow():
  good = json.loads(byte_level("gpt-2")._definition)
  split = {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated", "invert": False}
  level = good["pre_tokenizer"]["pretokenizers"][-1]
  for change, words in (
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}}, "no name for"),
    ({"pre_tokenizer": level | {"add_prefix_space": True}}, "has no equal in llama.cpp"),
    ({"normalizer": {"type": "Lowercase"}}, "normalizes text"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "only byte-level BPE"),
  ):
    tokenizer = HuggingFaceTokenizer(json.dumps(good | change), {"eos_token": "<|end|>"})
    with pytest.raises(DataError, match=words):
      tokenizer_metadata(tokenizer, 320, {})
  with pytest.raises(DataError, match="tokens but the model only 100"):
    tokenizer_metadata(byte_level("gpt-2"), 100, {})
