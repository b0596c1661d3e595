"""A tiny model beside llama.cpp's reading of its GGUF file: greedy text, log-probabilities, states, tokens."""

import itertools
import string

import gguf_models
import jax
import numpy as np
import tokenizers
from flax import nnx, traverse_util
from llama_cpp_child import ask

from jaxllm.data.tokenizers import HuggingFaceTokenizer
from jaxllm.inference.model import Model
from jaxllm.interop.gguf import read_gguf, write_gguf
from jaxllm.interop.huggingface import from_huggingface
from jaxllm.interop.sentence_transformers import TextVectors
from jaxllm.models.build import declare
from jaxllm.models.config import Compute

PROMPT = np.random.default_rng(1).integers(5, 300, 40).tolist()
STEPS = 12
# Each token is a text of its own: its server says nothing of steps that end within a character.
_WORDS = {a + b: i for i, (a, b) in enumerate(itertools.islice(itertools.product(string.ascii_letters, repeat=2), 384))}
_BPE = tokenizers.Tokenizer(tokenizers.models.BPE(_WORDS, []))
_BPE.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
LETTERS = HuggingFaceTokenizer(_BPE.to_str(), {"eos_token": "aa"})


def greedy(file, hf, tensors, dtype="f32"):
  """llama.cpp's greedy tokens [T] after PROMPT, and its and our log-probabilities [T, V] there."""
  write_gguf(file, hf, tensors, LETTERS, dtype=dtype)
  model, config = _model(hf, tensors)
  if config.architecture == "encoder_decoder":
    (answer,) = ask(file, ("encode", {"prompt": PROMPT, "steps": STEPS, "vocab": gguf_models.VOCAB}))
    tokens, theirs = answer["tokens"], np.asarray(jax.nn.log_softmax(np.array(answer["logits"])))
    ids = np.array([[config.decoder_start_id, *tokens[:-1]]], np.int32)
    logits = model(ids, encoded=model.encode(np.array([PROMPT], np.int32)))[0][0]
    return tokens, theirs, np.asarray(jax.nn.log_softmax(logits))
  body = {"prompt": PROMPT, "n_predict": STEPS, "temperature": 0, "n_probs": gguf_models.VOCAB, "ignore_eos": False}
  (answer,) = ask(file, ("/completion", body | {"return_tokens": True, "cache_prompt": False}))
  probabilities, tokens = answer["completion_probabilities"], answer["tokens"]
  assert [step["id"] for step in probabilities] == tokens
  theirs = np.full((len(tokens), gguf_models.VOCAB), -np.inf)
  for row, step in zip(theirs, probabilities):
    for token in step["top_logprobs"]:
      row[token["id"]] = token["logprob"]
  logits = model(np.array([PROMPT + tokens], np.int32))[0][0, len(PROMPT) - 1 : -1]
  return tokens, theirs, np.asarray(jax.nn.log_softmax(logits))


def states(file, hf, tensors):
  """llama.cpp's and our states [T, D] of PROMPT's tokens, of an encoder."""
  write_gguf(file, hf, tensors, LETTERS)
  (answer,) = ask(file, ("/embedding", {"content": PROMPT, "embd_normalize": -1}), embedding=True)
  model, _ = _model(hf, tensors)
  return np.array(answer[0]["embedding"]), np.asarray(model.hidden(np.array([PROMPT], np.int32))[0][0])


def pooled(file, hf, tensors, pooling):
  """llama.cpp's vector of PROMPT, as the file says, and ours."""
  write_gguf(file, hf, tensors, LETTERS, vectors=TextVectors((pooling,), (None,)))
  (answer,) = ask(file, ("/embedding", {"content": PROMPT}), embedding="pooled")
  config, params = from_huggingface(hf, tensors)
  params = {path: tensor.read() for path, tensor in params.items()}
  model = Model(config, traverse_util.unflatten_dict(params, sep="/"), vectors=read_gguf(file).vectors)
  return np.array(answer[0]["embedding"][0]), model.embed(PROMPT)[0]


def labels(file, hf, tensors):
  """llama.cpp's and our logits of the labels of PROMPT."""
  write_gguf(file, hf, tensors, LETTERS)
  (answer,) = ask(file, ("/embedding", {"content": PROMPT, "embd_normalize": -1}), embedding="rank")
  ours = np.asarray(_model(hf, tensors)[0](np.array([PROMPT], np.int32))[0][0])
  return np.array(answer[0]["embedding"][0][: len(ours)]), ours


def ranks(file, hf, tensors, tokenizer, answers, pairs):
  """How well texts answer "The quick brown fox" for llama.cpp; and for us, given the tokens of the pairs."""
  write_gguf(file, hf, tensors, tokenizer)
  (answer,) = ask(file, ("/rerank", {"query": "The quick brown fox", "documents": answers}), embedding="rank")
  theirs = {found["index"]: found["relevance_score"] for found in answer["results"]}
  model, _ = _model(hf, tensors)
  # Their positions are said: the end of these texts has the number of the model's padding, which is not counted here.
  ours = [float(model(np.array([pair], np.int32), positions=np.arange(len(pair))[None])[0][0, 0]) for pair in pairs]
  return [theirs[i] for i in range(len(answers))], ours


def tokenized(file, tokenizer, texts):
  """llama.cpp's tokens of texts, special ones around them."""
  write_gguf(file, *gguf_models.checkpoint("llama"), tokenizer)
  posts = [("/tokenize", {"content": text, "add_special": True, "parse_special": True}) for text in texts]
  return [answer["tokens"] for answer in ask(file, *posts)]


def tolerance(config):
  """Of log-probabilities: ggml looks gelu up in a table of float16, and caches an encoder-decoder's keys in it."""
  if config.architecture == "encoder_decoder":
    return 2e-2
  return 5e-3 if "gelu" in config.mlp or "geglu" in config.mlp else 5e-4


def _model(hf, tensors):
  config, params = from_huggingface(hf, tensors)
  params = traverse_util.unflatten_dict({path: tensor.read() for path, tensor in params.items()}, sep="/")
  return nnx.merge(declare(config, Compute(attention="xla", unroll_layers=1))[0], params), config
