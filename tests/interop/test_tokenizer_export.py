"""SentencePiece models as tokenizer.json files that encode alike."""

import random

import pytest
from sentencepiece import sentencepiece_model_pb2

from jaxllm.data.tokenizers import SentencePieceTokenizer, as_huggingface, load_tokenizer

WORLD = ["", " ", "   ", "a", " a ", "▁ is no space ▁▁", "你好，世界", "🎉👩‍👩‍👧🇩🇪", "naïve Ünïcödé é", "العربية हिन्दी"]
WORLD += ["\t\n\r\n  x = 1\n", "12345 6.7e-8"]


def random_texts(alphabet, count):
  draw = random.Random(0)
  return ["".join(draw.choices(alphabet, k=draw.randint(1, 60))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_it_encodes_and_decodes_alike(sentencepiece, stdlib, kind, tmp_path):
  ours = sentencepiece[kind]
  as_huggingface(ours).save(tmp_path)
  theirs = load_tokenizer(tmp_path)
  texts = WORLD + random_texts('abc_(),.12▁é你="\n 🎉', 500) + random_texts("    \n\tx-=", 1000)
  texts += [source.decode() for source in stdlib[20:60]]
  scores = [piece.score for piece in sentencepiece_model_pb2.ModelProto.FromString(ours.model).pieces]
  differ = 0
  for text, want, got in zip(texts, ours.encode_batch(texts), theirs.encode_batch(texts)):
    assert theirs.decode(want) == ours.decode(want) == text
    if got.tolist() != want.tolist():
      differ += 1
      assert sum(scores[i] for i in got) == pytest.approx(sum(scores[i] for i in want), rel=1e-6), text
  # A unigram model may find two divisions of a run of spaces equally good.
  assert differ == 0 if kind == "bpe" else differ < 0.2 * len(texts)
  assert theirs.encode_prompt("def f():").tolist() == ours.encode_prompt("def f():").tolist()
  assert [ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id, ours.vocab_size] == [
    theirs.bos_id, theirs.eos_id, theirs.pad_id, theirs.unk_id, theirs.vocab_size
  ]  # fmt: skip
  assert theirs.special_tokens == ours.special_tokens


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_llamas_way_of_training(stdlib, kind):
  """With a space before the text, NFKC and whitespace collapsed."""
  import io

  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([line for source in stdlib[:8] for line in source.decode().splitlines() if line.strip()]),
    model_writer=model, model_type=kind, vocab_size=600, byte_fallback=True, minloglevel=3,
  )  # fmt: skip
  ours = SentencePieceTokenizer(model.getvalue(), {"added_tokens_decoder": {"600": {"content": "<new>"}}})
  theirs = as_huggingface(ours)
  for text in [*WORLD, "ﬁve  x", *random_texts("ab (é你ﬁ", 300)]:
    assert theirs.encode(text).tolist() == ours.encode(text).tolist(), text
    assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
  assert theirs.encode_prompt("x<new>").tolist()[-1] == ours.encode_prompt("x<new>").tolist()[-1] == 600


def test_transformers_reads_it(sentencepiece, tmp_path):
  transformers = pytest.importorskip("transformers")
  ours = sentencepiece["bpe"]
  as_huggingface(ours).save(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  for text in WORLD:
    ids = ours.encode_prompt(text).tolist()
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids, skip_special_tokens=True) == text
  assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
