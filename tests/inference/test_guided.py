"""Guided output: whatever is drawn, the text is valid, with every kind of tokenizer."""

import functools
import io
import json
import re
import string

import numpy as np
import pytest
import tiny_models as tiny

from jaxllm.base.errors import ConfigError
from jaxllm.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer
from jaxllm.inference.logits import pack
from jaxllm.inference.params import SamplingParams, StructuredOutputsParams

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from jaxllm.inference.guided import Guide, PieceText  # noqa: E402

TEXT = [
  '{"name": "Anna", "age": 31, "tags": ["red", "blue"]}',
  "the answer is yes, or no; 12.5 apples",
  string.printable,
]


@functools.cache
def tokenizer(kind):
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  if kind == "bytes":
    return tiny.huggingface_bytes()
  if kind.startswith("sentencepiece"):
    import sentencepiece

    model, prefix = io.BytesIO(), kind.endswith("prefix")
    fallback = dict(byte_fallback=True) if prefix else {}
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXT * 20), model_writer=model, model_type="bpe", vocab_size=400 if prefix else 170,
      add_dummy_prefix=prefix, character_coverage=1.0, minloglevel=3, hard_vocab_limit=False, **fallback
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue())
  if kind == "bpe":
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
      vocab_size=330, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(TEXT * 20, trainer)
    return HuggingFaceTokenizer(trained.to_str(), {"eos_token": "</s>"})
  characters = sorted(set(string.ascii_letters + string.digits + string.punctuation))
  pieces = ["[UNK]", "[SEP]", *characters, *(f"##{c}" for c in characters), "name", "##ame", "yes"]
  wordpiece = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
  wordpiece.pre_tokenizer, wordpiece.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
  return HuggingFaceTokenizer(wordpiece.to_str(), {"eos_token": "[SEP]", "unk_token": "[UNK]"})


KINDS = ["bytes", "bpe", "sentencepiece", "sentencepiece_prefix", "wordpiece"]
SCHEMA = {
  "type": "object",
  "properties": {
    "name": {"type": "string", "maxLength": 5},
    "age": {"type": "integer", "minimum": 0, "maximum": 150},
    "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3},
    "ok": {"type": "boolean"},
  },
  "required": ["name", "age"],
  "additionalProperties": False,
}
ARITHMETIC = 'start: term ("+" term)*\nterm: /[0-9]{1,2}/ | "(" start ")"'


def is_json(text):
  jsonschema.validate(json.loads(text), SCHEMA)
  return True


def one_line(text):
  return is_json(text) and not re.search(r"\s", re.sub(r'"(\\.|[^"\\])*"', "", text))


WANTED = {
  "json": (dict(json=SCHEMA), is_json),
  "json_line": (dict(json=json.dumps(SCHEMA), disable_any_whitespace=True), one_line),
  "json_object": (dict(json_object=True), lambda text: isinstance(json.loads(text), dict)),
  "regex": (dict(regex=r"(ab|c)+[0-9]{2,4}-?x"), lambda text: re.fullmatch(r"(ab|c)+[0-9]{2,4}-?x", text)),
  "choice": (dict(choice=["yes", "no", 'say "hi"', "a\\b"]), lambda text: text in ("yes", "no", 'say "hi"', "a\\b")),
  "grammar": (dict(grammar=ARITHMETIC), lambda text: re.fullmatch(r"[0-9+()]+", text) and eval_ok(text)),
  "gbnf": (dict(grammar='root ::= "a" root | "b"'), lambda text: re.fullmatch("a*b", text)),
}


def eval_ok(text):
  return isinstance(eval(re.sub(r"\b0+(?=\d)", "", text)), int)


def members(words):
  return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))


def random_text(wanted, kind, seed, vocab_size=None, longest=500):
  """The text of tokens drawn from those allowed, up to an end; what closes something is likelier."""
  tok, rng = tokenizer(kind), np.random.default_rng(seed)
  vocab_size = vocab_size or tok.vocab_size
  closes = [re.search(rb'["}\])]', piece) is not None for piece in tok.pieces()]
  weights = np.where(closes + [False] * (vocab_size - tok.vocab_size), 20.0, 1.0)
  guide, ids = Guide(StructuredOutputsParams(**wanted), tok, vocab_size, [tok.eos_id]), []
  while not guide.finished and len(ids) < longest:
    allowed = members(guide.allowed)
    token = int(rng.choice(allowed, p=weights[allowed] / weights[allowed].sum()))
    if token == tok.eos_id:
      return PieceText(tok).decode(ids), ids
    guide.take(token)
    ids.append(token)
  assert guide.finished
  return PieceText(tok).decode(ids), ids


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("kind", KINDS)
def test_random_tokens_make_valid_texts(kind, name):
  wanted, valid = WANTED[name]
  texts = [random_text(wanted, kind, seed, vocab_size=tokenizer(kind).vocab_size + seed)[0] for seed in range(8)]
  assert all(map(valid, texts)), texts
  assert len(set(texts)) > 1


@pytest.mark.parametrize("kind", ["bytes", "bpe", "sentencepiece_prefix"])
def test_the_text_is_that_of_the_tokenizer(kind):
  """Behind a prompt, the pieces are what the tokenizer's own decoder shows."""
  tok = tokenizer(kind)
  text, ids = random_text(WANTED["json"][0], kind, 3)
  before = tok.encode("the").tolist()
  assert tok.decode(before + ids) == "the" + text


def test_an_end_is_allowed_only_where_the_text_may_end():
  tok = tokenizer("bytes")
  guide = Guide(StructuredOutputsParams(regex="ab?"), tok, tok.vocab_size, [tiny.EOS, 9])
  ends = pack([tiny.EOS, 9], tok.vocab_size)
  assert not np.any(guide.allowed & ends) and not guide.finished
  guide.take(ord("a"))
  assert np.array_equal(guide.allowed, pack([ord("b"), tiny.EOS, 9], tok.vocab_size)) and not guide.finished
  guide.take(ord("b"))
  assert np.array_equal(guide.allowed, ends) and guide.finished
  endless = Guide(StructuredOutputsParams(regex="ab?"), tok, tok.vocab_size, [])
  endless.take(ord("a"))
  assert np.array_equal(endless.allowed, pack([ord("b")], tok.vocab_size))


def test_masks_behind_drafts_are_those_of_taking_them():
  tok = tokenizer("bytes")
  wanted = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
  guide = Guide(wanted, tok, 258, [tiny.EOS])
  drafts = list(b'{"name":"x') + [tiny.BOS, 5]
  masks, want = guide.allowed_after(drafts), [guide.allowed]
  for draft in drafts[:-2]:
    guide.take(draft)
    want.append(guide.allowed)
  np.testing.assert_array_equal(masks[: len(want)], want)
  assert (masks[len(want) :] == 0xFFFFFFFF).all() and len(masks) == len(drafts) + 1


@pytest.mark.parametrize(
  "wanted, message",
  [
    (dict(json={"type": "nothing"}), "Invalid type: nothing"),
    (dict(json='{"type": '), "structured_outputs"),
    (dict(json={"not": {"type": "string"}}), "Unimplemented keys"),
    (dict(json={"$ref": "#/$defs/x"}), "does not exist"),
    (dict(regex="("), "unclosed group"),
    (dict(grammar="start: foo"), 'unknown name: "foo"'),
  ],
)
def test_invalid_grammars_are_one_clear_line(wanted, message):
  with pytest.raises(ConfigError, match=message) as raised:
    Guide(StructuredOutputsParams(**wanted), tokenizer("bytes"), 258, [tiny.EOS])
  assert "\n" not in str(raised.value)


def test_what_the_tokenizer_cannot_write_is_told():
  with pytest.raises(ConfigError, match="no token with which the text could go on"):
    Guide(StructuredOutputsParams(regex="数学"), tokenizer("wordpiece"), 200, [1])
  guide = Guide(StructuredOutputsParams(regex="ab"), tokenizer("bytes"), 258, [tiny.EOS])
  with pytest.raises(ConfigError, match="doesn't satisfy the grammar"):
    guide.take(ord("x"))


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(), "not none of them"),
    (dict(regex="a", choice=["b"]), "not regex and choice"),
    (dict(choice=[]), "choice must be"),
    (dict(choice="yes"), "choice must be"),
    (dict(regex=5), "regex is 5"),
    (dict(json=5), "JSON schema"),
  ],
)
def test_impossible_structured_outputs(fields, message):
  with pytest.raises(ConfigError, match=message):
    StructuredOutputsParams(**fields)


def test_a_model_writes_what_is_wanted():
  """Every row its own, guided or not, greedy or drawn; a guided one does not change its neighbours."""
  model = tiny.loose_model()
  wanted = [dict(choice=["yes", "no"]), dict(regex="[0-9]{3}x+"), dict(json={"type": "integer", "maximum": 999})]
  settings = [SamplingParams(seed=i, max_tokens=40, structured_outputs=one) for i, one in enumerate(wanted)]
  free = SamplingParams(seed=7, max_tokens=40)
  done = model.generate(["a", "b", "c", "d"], [*settings, free])
  assert done[0].text in ("yes", "no") and done[0].finish_reason == "stop" and done[0].stop_reason is None
  assert re.fullmatch("[0-9]{3}x+", done[1].text) or done[1].finish_reason == "length"
  assert int(done[2].text) <= 999
  assert done[3].token_ids == model.generate("d", free)[0].token_ids
  greedy = model.generate("a", temperature=0, structured_outputs=dict(regex="(ab){2}"))[0]
  assert greedy.text == "abab" and greedy.token_ids == tuple(b"abab")
  with pytest.raises(ConfigError, match="Invalid type"):
    model.generate("a", structured_outputs=dict(json={"type": "nothing"}))
