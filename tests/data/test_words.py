"""Whole words of a row of tokens, in scripts with spaces and without."""

import io
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxllm.data.corruption import mask_words
from jaxllm.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, byte_alphabet
from jaxllm.data.words import words_of

CHINESE = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u6211\u4eec\u4e00\u8d77\u53bb\u516c\u56ed\u6563\u6b65\u5427"


def byte_level():
  """Each token is a byte."""
  rust = tokenizers.Tokenizer(models.BPE(byte_alphabet(), []))
  rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  return HuggingFaceTokenizer(rust.to_str())


def wordpiece():
  """Each token is a character; between Chinese ones there are no spaces, as in vocabularies that are not BERT's."""
  letters = sorted({*"abcdefghijklmnopqrstuvwxyz'-,.!", *CHINESE})
  ids = {token: i for i, token in enumerate(["[UNK]", *letters, *(f"##{letter}" for letter in letters)])}
  rust = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
  rust.normalizer = normalizers.BertNormalizer(lowercase=True, handle_chinese_chars=False)
  rust.pre_tokenizer, rust.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
  return HuggingFaceTokenizer(rust.to_str())


def sentence_pieces():
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the river runs past the old mill", "a b c d e f g h"] * 20), model_writer=model,
    model_type="bpe", vocab_size=290, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
  )  # fmt: skip
  return SentencePieceTokenizer(model.getvalue())


KINDS = {"bytes": byte_level(), "wordpiece": wordpiece(), "sentencepiece": sentence_pieces()}


def words(tokenizer, text):
  """The texts of a row's words."""
  ids, table = tokenizer.encode(text), words_of(tokenizer)
  numbers, pieces = table.number(ids), tokenizer.pieces()
  assert np.all(np.diff(numbers) >= 0) and np.all(np.diff(numbers) <= 1) and numbers[0] == 0
  joined = [b"".join(pieces[i] for i in ids[numbers == n]).decode().strip() for n in range(numbers[-1] + 1)]
  return [word for word in joined if word]


@pytest.mark.parametrize("kind", KINDS)
def test_chinese_characters_are_words_and_others_stand_between_spaces(kind):
  assert words(KINDS[kind], CHINESE) == list(CHINESE)
  assert words(KINDS[kind], "the river-mill, don't") == ["the", "river-mill,", "don't"]
  assert words(KINDS[kind], f"the {CHINESE[:2]}river {CHINESE[2]}") == ["the", *CHINESE[:2], "river", CHINESE[2]]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("text, want", [
  # What Unicode's default rules (UAX #29) make of them, marks with the letters that they are on.
  ("\u3072\u3089\u304c\u306a\u30c6\u30b9\u30c8\u3068\u6f22\u5b57",
   [*"\u3072\u3089\u304c\u306a", "\u30c6\u30b9\u30c8", *"\u3068\u6f22\u5b57"]),
  ("\u304b\u3099\u3068", ["\u304b\u3099", "\u3068"]),
  ("\u0e17\u0e35\u0e48\u0e19\u0e35\u0e48", ["\u0e17\u0e35\u0e48", "\u0e19\u0e35\u0e48"]),
  ("\u0e9e\u0eb2\u0eaa\u0eb2", ["\u0e9e", "\u0eb2", "\u0eaa", "\u0eb2"]),
  ("\u1797\u17b6\u179f\u17b6", ["\u1797\u17b6", "\u179f\u17b6"]),
  ("\u1019\u103c\u1014\u103a", ["\u1019\u103c", "\u1014\u103a"]),
  ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", ["\ud55c\uad6d\uc5b4", "\ubb38\uc7a5"]),
  ("\u0939\u093f\u0928\u094d\u0926\u0940 na\u00efve", ["\u0939\u093f\u0928\u094d\u0926\u0940", "na\u00efve"]),
  ("\U0001f642\U0001f642 \U00020000\U00020001a", ["\U0001f642\U0001f642", "\U00020000", "\U00020001", "a"]),
])  # fmt: skip
def test_other_scripts(kind, text, want):
  assert unicodedata.normalize("NFC", "".join(want)) == unicodedata.normalize("NFC", text.replace(" ", ""))
  text = text if kind == "bytes" else unicodedata.normalize("NFKC", text)  # as the model has it
  want = want if kind == "bytes" else [unicodedata.normalize("NFKC", word) for word in want]
  assert words(KINDS[kind], text) == want


def test_special_tokens_and_broken_characters():
  tokenizer = KINDS["bytes"]
  table, ids = words_of(tokenizer), tokenizer.encode(CHINESE[:2])
  cut = [*ids[:2], *ids[4:]]  # a character without its last byte, then two bytes of another
  assert table.number(np.array(cut)).tolist()[0] == 0
  assert table.number(ids, whole=False).tolist() == list(range(6))


def test_rows_without_spaces_are_masked_in_part():
  rng = np.random.default_rng(0)
  for tokenizer in KINDS.values():
    ids, table = tokenizer.encode(CHINESE * 4), words_of(tokenizer)
    numbers = table.number(ids)
    chosen = [mask_words(ids, numbers, rng, rate=0.15, mask_id=4, random_ids=np.arange(3))[1].mean() for _ in range(50)]
    assert min(chosen) > 0 and max(chosen) < 0.5
