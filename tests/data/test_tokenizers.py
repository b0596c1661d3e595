"""Round trips over any bytes, and agreement with the libraries' own encoders."""

import json
import pickle

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oddities import ODDITIES

from jaxllm.base.errors import DataError
from jaxllm.data.config import TokenizerConfig
from jaxllm.data.sources import open_source, stdlib_sources
from jaxllm.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from jaxllm.data.train_tokenizer import _chunks, _sample, train_sentencepiece

TEXT = [
  ("def f(x):\n    return x + 1\n\n\n" + "caf\u00e9 \u4e2d\u6587 na\u00efve 123 the quick brown fox\t\tjumps\r\n") * 20,
  "".join(f"line {i}: some other words about token number {i}\n" for i in range(100)),
]
DOCUMENTS = [text.encode() for text in TEXT]
# Unlike st.text(), also runs of what the tokenizers treat specially.
TRICKY = st.lists(
  st.sampled_from(["\u2581", " ", "  ", "\t", "\n", "\r\n", "\0", "\u2585", "<s>", "<0x41>", "\U0001f600", "a", "fox"])
  | st.text(max_size=5)
).map("".join)


@pytest.fixture(scope="module")
def trained():
  return {
    kind: train_sentencepiece(DOCUMENTS, TokenizerConfig(kind=f"sentencepiece_{kind}", vocab_size=310))
    for kind in ("bpe", "unigram")
  }


@pytest.fixture(scope="module")
def byte_bpe(tmp_path_factory):
  """A byte-level BPE with GPT-2's pre-tokenizer, as `tokenizers` trains it."""
  tokenizer = tokenizers.ByteLevelBPETokenizer()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(alphabet), show_progress=False
  )
  tokenizer._tokenizer.train_from_iterator(TEXT, trainer)
  path = tmp_path_factory.mktemp("byte_bpe") / "tokenizer.json"
  tokenizer._tokenizer.save(str(path))
  return path


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("data", ODDITIES)
def test_oddities_round_trip(trained, kind, data):
  tokenizer = trained[kind]
  assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60))
@example(b"\xe2\x96\x81")
@example(b"\xe2\x96")
def test_any_bytes_round_trip(trained, byte_bpe, data):
  for tokenizer in (*trained.values(), load_tokenizer(byte_bpe)):
    ids = tokenizer.encode(data)
    assert ids.dtype == np.int32
    assert tokenizer.decode_bytes(ids) == data


@settings(deadline=None, max_examples=300)
@given(TRICKY)
def test_any_text_round_trips(trained, byte_bpe, text):
  for tokenizer in (*trained.values(), load_tokenizer(byte_bpe)):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=200)
@given(TRICKY)
def test_encodes_as_sentencepiece_does(trained, text):
  text = text.replace("\u2581", "")  # SentencePiece itself turns it into a space
  for tokenizer in trained.values():
    reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert tokenizer.encode(text).tolist() == reference.encode(text)


@settings(deadline=None, max_examples=200)
@given(TRICKY)
def test_encodes_as_tokenizers_does(byte_bpe, text):
  reference = tokenizers.Tokenizer.from_file(str(byte_bpe))
  text = text.replace("<", "")  # the reference finds special tokens in text
  ids = load_tokenizer(byte_bpe).encode(text).tolist()
  assert ids == reference.encode(text, add_special_tokens=False).ids
  assert load_tokenizer(byte_bpe).decode(ids) == reference.decode(ids, skip_special_tokens=False)


def test_batch_is_one_by_one(trained, byte_bpe):
  for tokenizer in (*trained.values(), load_tokenizer(byte_bpe)):
    texts = [*ODDITIES, *TEXT, ""]
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
      assert ids.tolist() == tokenizer.encode(text).tolist()


def test_special_ids_are_set_and_never_come_out_of_text(trained, byte_bpe):
  for tokenizer in trained.values():
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 310
    assert tokenizer.encode("<s></s><pad><unk>").min() > 3
    assert tokenizer.decode([1, *tokenizer.encode("fox"), 2, 0]) == "fox"
    assert tokenizer.start_id == 1
  tokenizer = load_tokenizer(byte_bpe)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.start_id) == (None, 0, 0)
  assert tokenizer.encode("<|endoftext|>").min() > 0
  assert tokenizer.decode([0, *tokenizer.encode("fox"), 0]) == "fox"


def test_whitespace_runs_are_pieces():
  """What makes code cheap: an indentation, and a line's end, are one token; digits are single."""
  code = "".join(f"def f{i}(x):\n    if x > {i}:\n        return x\n\n" for i in range(200)).encode()
  tokenizer = train_sentencepiece([code], TokenizerConfig(vocab_size=300))
  assert len(tokenizer.encode("    ")) == 1
  assert len(tokenizer.encode(":\n")) == 1
  assert len(tokenizer.encode("123")) == 3


def test_llama_like_model():
  """With a dummy prefix and NFKC, ids are SentencePiece's own; odd bytes get no second prefix."""
  import io

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(" ".join(TEXT).split("\n")), model_writer=model, vocab_size=340, model_type="bpe",
    byte_fallback=True, minloglevel=2,
  )  # fmt: skip
  tokenizer = SentencePieceTokenizer(model.getvalue())
  reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  assert not tokenizer.lossless
  for text in ("the quick fox", "caf\u00e9 \u4e2d \u2460\u2581x", "  two  spaces "):
    assert tokenizer.encode(text).tolist() == reference.encode(text)
    assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text))
  assert tokenizer.decode_bytes(tokenizer.encode(b"the\xfffox")) == b"the\xfffox"


def test_vocabularies_without_byte_level():
  """A WordPiece vocabulary cannot know odd bytes; one with byte fallback has them as pieces."""
  pieces = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "fox": 3, "##es": 4}
  wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
  wordpiece.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  wordpiece.decoder = tokenizers.decoders.WordPiece()
  tokenizer = HuggingFaceTokenizer(wordpiece.to_str())
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
  assert tokenizer.encode(b"foxes \xff").tolist() == [3, 4, 0]
  assert tokenizer.decode([3, 4]) == "foxes"

  vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "</s>": 257}
  fallback = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
  fallback.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
  tokenizer = HuggingFaceTokenizer(fallback.to_str())
  assert tokenizer.encode(b"a\xff").tolist() == [256, 255]
  assert tokenizer.decode(tokenizer.encode("a\u4e2d")) == "a\u4e2d"
  del vocabulary["<0xFF>"]
  without = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
  with pytest.raises(DataError, match="no piece for the bytes"):
    HuggingFaceTokenizer(without.to_str()).encode(b"a\xff")


def test_save_load_pickle_keep_the_fingerprint(trained, byte_bpe, tmp_path):
  for name, tokenizer in {**trained, "hf": load_tokenizer(byte_bpe)}.items():
    tokenizer.save(tmp_path / name)
    for other in (load_tokenizer(tmp_path / name), pickle.loads(pickle.dumps(tokenizer))):
      assert other.fingerprint == tokenizer.fingerprint
      assert other.encode(TEXT[0]).tolist() == tokenizer.encode(TEXT[0]).tolist()
      assert other.eos_id == tokenizer.eos_id
  assert len({t.fingerprint for t in trained.values()}) == 2


def test_special_tokens_from_tokenizer_config(byte_bpe, tmp_path):
  (tmp_path / "tokenizer.json").write_bytes(byte_bpe.read_bytes())
  config = tmp_path / "tokenizer_config.json"
  config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "a"}, "model_max_length": 5}))
  tokenizer = load_tokenizer(tmp_path)
  assert tokenizer.eos_id == tokenizer.encode("a")[0]
  assert tokenizer.fingerprint != load_tokenizer(byte_bpe).fingerprint
  config.write_text(json.dumps({"eos_token": "<absent>"}))
  with pytest.raises(DataError, match="eos_token '<absent>' is not in"):
    load_tokenizer(tmp_path)
  config.write_text(json.dumps({"eos_token": None}))
  with pytest.raises(DataError, match="no end-of-text token"):
    load_tokenizer(tmp_path).start_id  # noqa: B018


def test_load_errors(trained, byte_bpe, tmp_path):
  with pytest.raises(DataError, match="cannot read the tokenizer .*No such file"):
    load_tokenizer(tmp_path / "none.model")
  with pytest.raises(DataError, match="no tokenizer in"):
    load_tokenizer(tmp_path)
  for name in ("tokenizer.model", "tokenizer.json"):
    whole = trained["bpe"].model if name.endswith("model") else byte_bpe.read_bytes()
    for data in (b"nonsense \xff", b"{}", b"", whole[: len(whole) // 2]):
      (tmp_path / name).write_bytes(data)
      with pytest.raises(DataError, match=f"cannot load the tokenizer .*{name}"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "sentencepiece_unigram"])
@pytest.mark.parametrize(
  "texts, size, match",
  [
    ([b"hello world"], 4096, r"too small for data.tokenizer.vocab_size 4096; set it to at most \d+"),
    (["".join(map(chr, range(0x4E00, 0x5000))).encode()], 300, r"set it to at least \d+"),
    ([b"\xff"], 300, "no UTF-8 text"),
    ([b"hello"], 100, "vocab_size 100 is too small"),
  ],
)
def test_training_errors(kind, texts, size, match):
  with pytest.raises(DataError, match=match):
    train_sentencepiece(texts, TokenizerConfig(kind=kind, vocab_size=size))


def test_advised_size_works():
  """The size that the error names does train."""
  with pytest.raises(DataError) as caught:
    train_sentencepiece(DOCUMENTS, TokenizerConfig(vocab_size=30000))
  size = int(str(caught.value).split()[-1])
  assert train_sentencepiece(DOCUMENTS, TokenizerConfig(vocab_size=size)).vocab_size == size


def test_training_sample_is_even():
  chunks = list(_chunks("".join(f"{i}\n" for i in range(20000))))
  assert "".join(chunks) == "".join(f"{i}\n" for i in range(20000))
  assert all(chunk.endswith("\n") and len(chunk) <= 2048 for chunk in chunks)
  assert "".join(_chunks("x" * 5000)) == "x" * 5000
  documents = [f"{i} ".encode() * 10 for i in range(1000)]
  kept = [int(text.split()[0]) for text in _sample(documents, 0.1)]
  assert len(kept) == 100
  assert set(np.diff(kept)) == {10}
  assert list(_sample(documents[:3], 1.0)) == [d.decode() for d in documents[:3]]


@pytest.mark.slow
def test_the_standard_library_round_trips():
  data = [document.data for document in open_source(stdlib_sources()).documents()]
  tokenizer = train_sentencepiece(data, TokenizerConfig(), sum(map(len, data)))
  for ids, original in zip(tokenizer.encode_batch(data), data, strict=True):
    assert tokenizer.decode_bytes(ids) == original


HALF, DIGITS = "\ud800 half", "0123456789" * 6


def test_text_that_a_tokenizer_cannot_read_is_refused_in_a_line(tmp_path):

  rust = tokenizers.Tokenizer(tokenizers.models.BPE({str(i): i for i in range(10)}, []))
  hostile = tokenizers.Regex(r"(?:(?:[0-9]+.?)+)+!")  # Oniguruma counts its steps, and Rust panics at too many
  rust.pre_tokenizer = tokenizers.pre_tokenizers.Split(hostile, "isolated")
  tokenizer = HuggingFaceTokenizer(rust.to_str())
  for encode in (tokenizer.encode, tokenizer.encode_prompt, lambda text: tokenizer.encode_chats([text])):
    with pytest.raises(DataError, match="cannot read this text") as raised:
      encode(DIGITS)
    assert str(raised.value).isprintable()
  with pytest.raises(DataError, match="cannot read this text"):
    tokenizer.encode_prompt(HALF)


@pytest.mark.parametrize(
  "vocab, message",
  [({}, "without tokens"), ({"a": 2**32 - 1}, "ids that no vocabulary has"), ({"a": 2**40}, "damaged"), (5, "damaged")],
)
def test_a_vocabulary_that_is_none(vocab, message):
  model = {"type": "BPE", "vocab": vocab, "merges": []}
  with pytest.raises(DataError, match=message):
    HuggingFaceTokenizer(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
