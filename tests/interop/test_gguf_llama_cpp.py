"""llama.cpp (the wheel xllamacpp) computes what we do from the files that we write."""

import json

import gguf_models
import numpy as np
import pytest
from gguf_against_llama import greedy, labels, pooled, ranks, states, tokenized, tolerance
from test_gguf_tokenizers import KNOWN, TEXTS, byte_level, characters_with_bytes, unigram, wordpiece

from jaxllm.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer
from jaxllm.interop.gguf.tokenizer import PRE_TOKENIZERS
from jaxllm.interop.huggingface import config_from_huggingface

pytestmark = pytest.mark.slow
pytest.importorskip("xllamacpp")


@pytest.mark.parametrize("name", gguf_models.CONFIGS | gguf_models.SEEING | gguf_models.ENCODER_DECODERS)
def test_greedy_continuations(tmp_path, name):
  hf, tensors = gguf_models.checkpoint(name)
  tokens, theirs, ours = greedy(tmp_path / "x.gguf", hf, tensors)
  assert np.std(ours) > 0.05 and len(tokens) > 0
  np.testing.assert_array_equal(ours.argmax(-1), tokens)
  np.testing.assert_allclose(theirs, ours, rtol=0, atol=tolerance(config_from_huggingface(hf)))


@pytest.mark.parametrize("name", gguf_models.ENCODERS)
def test_states_of_tokens(tmp_path, name):
  theirs, ours = states(tmp_path / "x.gguf", *gguf_models.checkpoint(name))
  assert np.std(ours) > 0.05
  np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", gguf_models.RANKERS)
def test_labels_of_texts(tmp_path, name):
  theirs, ours = labels(tmp_path / "x.gguf", *gguf_models.checkpoint(name))
  np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-3)


def test_ranks_of_answers(tmp_path, sentencepiece_unigram):
  """The two texts in one, as RoBERTa's tokenizer puts them together."""
  tokenizer, answers = unigram(sentencepiece_unigram), ["the lazy dog", "def add(first, second)", "Hello"]
  rust = tokenizer._tokenizer
  pairs = [rust.encode("The quick brown fox", answer).ids for answer in answers]
  theirs, ours = ranks(tmp_path / "x.gguf", *gguf_models.checkpoint("bge-reranker"), tokenizer, answers, pairs)
  np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-3)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("name", ["xlm-roberta", "modernbert", "llama", "qwen3"])
def test_vectors_of_texts(tmp_path, name, pooling):
  theirs, ours = pooled(tmp_path / "x.gguf", *gguf_models.checkpoint(name), pooling)
  np.testing.assert_allclose(theirs, ours, rtol=0, atol=5e-4)


@pytest.mark.parametrize("kind", ["lower", "cased", "unigram"])
def test_prompts_of_encoders(tmp_path, kind, sentencepiece_unigram):
  texts = KNOWN if kind == "unigram" else [text for text in TEXTS if text.strip()]
  tokenizer = unigram(sentencepiece_unigram) if kind == "unigram" else wordpiece(kind == "lower")
  want = [tokenizer.encode_prompt(text).tolist() for text in texts]
  assert tokenized(tmp_path / "x.gguf", tokenizer, texts) == want


@pytest.mark.parametrize("kind", [*PRE_TOKENIZERS, "fallback", "fallback-prefix", "sentencepiece"])
def test_prompts(tmp_path, kind, sentencepiece_bpe):
  texts = [text for text in TEXTS if text]
  if kind.startswith("fallback"):
    definition = characters_with_bytes(sentencepiece_bpe, kind.endswith("prefix"))
    tokenizer = HuggingFaceTokenizer(json.dumps(definition), {"bos_token": "<s>", "eos_token": "</s>"})
  elif kind == "sentencepiece":
    tokenizer = SentencePieceTokenizer(sentencepiece_bpe.model, sentencepiece_bpe.settings)
  else:
    tokenizer = byte_level(kind)
  if kind == "fallback-prefix" or kind == "sentencepiece":
    texts = [text for text in texts if "<s>" not in text]
  want = [tokenizer.encode_prompt(text).tolist() for text in texts]
  assert tokenized(tmp_path / "x.gguf", tokenizer, texts) == want
