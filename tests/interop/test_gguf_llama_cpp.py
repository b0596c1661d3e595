"""llama.cpp computes what we do from the files that we write (where its wheel xllamacpp is installed)."""

import itertools
import json
import string

import gguf_models
import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx, traverse_util
from llama_cpp_child import ask
from test_gguf_tokenizers import TEXTS, byte_level, characters_with_bytes

from jaxllm.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer
from jaxllm.interop.gguf import write_gguf
from jaxllm.interop.gguf.tokenizer import PRE_TOKENIZERS
from jaxllm.interop.huggingface import from_huggingface
from jaxllm.models.build import declare
from jaxllm.models.config import Compute

pytestmark = pytest.mark.slow
pytest.importorskip("xllamacpp")
PROMPT = np.random.default_rng(1).integers(5, 300, 40).tolist()
STEPS = 12
# Each token is a text of its own: its server says nothing of steps that end within a character.
_WORDS = {a + b: i for i, (a, b) in enumerate(itertools.islice(itertools.product(string.ascii_letters, repeat=2), 384))}
_BPE = tokenizers.Tokenizer(tokenizers.models.BPE(_WORDS, []))
_BPE.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
LETTERS = HuggingFaceTokenizer(_BPE.to_str(), {"eos_token": "aa"})


@pytest.mark.parametrize("name", gguf_models.CONFIGS)
def test_greedy_continuations(tmp_path, name):
  hf, tensors = gguf_models.checkpoint(name)
  write_gguf(tmp_path / "x.gguf", hf, tensors, LETTERS)
  body = {"prompt": PROMPT, "n_predict": STEPS, "temperature": 0, "n_probs": gguf_models.VOCAB, "ignore_eos": False}
  (answer,) = ask(tmp_path / "x.gguf", ("/completion", body | {"return_tokens": True, "cache_prompt": False}))
  probabilities, tokens = answer["completion_probabilities"], answer["tokens"]
  assert [step["id"] for step in probabilities] == tokens
  theirs = np.full((len(tokens), gguf_models.VOCAB), -np.inf)
  for row, step in zip(theirs, probabilities):
    for token in step["top_logprobs"]:
      row[token["id"]] = token["logprob"]

  config, params = from_huggingface(hf, tensors)
  params = traverse_util.unflatten_dict({path: tensor.read() for path, tensor in params.items()}, sep="/")
  graph = declare(config, Compute(attention="xla", unroll_layers=1))[0]
  ids = np.array([PROMPT + tokens], np.int32)
  ours = jax.nn.log_softmax(jax.jit(lambda p, t: nnx.merge(graph, p)(t)[0])(params, ids)[0])
  ours = np.asarray(ours)[len(PROMPT) - 1 : -1]
  assert np.std(ours) > 0.05 and len(tokens) > 0
  np.testing.assert_array_equal(ours.argmax(-1), tokens)
  # ggml looks gelu up in a table of float16.
  tolerance = 5e-3 if "gelu" in config.mlp or "geglu" in config.mlp else 5e-4
  np.testing.assert_allclose(theirs, ours, rtol=0, atol=tolerance)


def tokenized(tmp_path, tokenizer, texts):
  hf, tensors = gguf_models.checkpoint("llama")
  write_gguf(tmp_path / "x.gguf", hf, tensors, tokenizer)
  posts = [("/tokenize", {"content": text, "add_special": True, "parse_special": True}) for text in texts]
  return [answer["tokens"] for answer in ask(tmp_path / "x.gguf", *posts)]


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
  assert tokenized(tmp_path, tokenizer, texts) == [tokenizer.encode_prompt(text).tolist() for text in texts]
