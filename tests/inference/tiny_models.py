"""Tiny models and tokenizers that the tests of this room share."""

import functools

import jax

from jaxllm.models.build import declare, init_params, unstack_layers
from jaxllm.models.config import ModelConfig

EOS, BOS = 256, 257


class ByteTokenizer:
  """One token a byte; 256 ends a text and 257 starts one."""

  vocab_size, bos_id, eos_id, pad_id, unk_id, tidies = 258, BOS, EOS, None, None, False

  def encode(self, text):
    return list(text.encode())

  def decode_bytes(self, ids):
    return bytes(i for i in ids if i < 256)

  def decode(self, ids, tidy=True):
    return self.decode_bytes(ids).decode("utf-8", "replace")


MODELS = {
  "rope": dict(num_kv_heads=1),
  "window": dict(sliding_window=5, layer_pattern=("local", "global"), num_layers=3, tie_embeddings=False),
  "learned": dict(position="learned", norm="layernorm", mlp="gelu", mlp_bias=True, attention_bias=True),
  "alibi": dict(position="alibi", sink_tokens=1, sliding_window=6),
}


@functools.cache
def model(name="rope", vocab_size=258, max_seq_len=48):
  """(graph, params, config) with weights large enough that the next token depends on the ones before."""
  sizes = dict(vocab_size=vocab_size, embed_dim=32, num_layers=2, num_heads=2, max_seq_len=max_seq_len)
  config = ModelConfig(**{**sizes, "init_std": 0.3, "init": "normal", **MODELS[name]})
  return declare(config)[0], unstack_layers(init_params(config, jax.random.key(0))), config


def huggingface_bytes():
  """ByteTokenizer as a tokenizer.json, for what reads tokenizers from files."""
  import tokenizers
  from tokenizers import AddedToken, decoders, pre_tokenizers, processors

  from jaxllm.data.tokenizers import HuggingFaceTokenizer, byte_alphabet

  vocabulary = {character: byte for character, byte in byte_alphabet().items()}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<bos>", special=True)])
  tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
  return HuggingFaceTokenizer(tokenizer.to_str(), {"bos_token": "<bos>", "eos_token": "<eos>"})


@functools.cache
def loose_model():
  """A `Model` of the "rope" config."""
  from jaxllm.inference.model import Model
  from jaxllm.models.build import stack_layers

  _, params, config = model()
  return Model(config, stack_layers(params), huggingface_bytes())


def save(directory):
  """Writes `loose_model` as a model directory."""
  loose_model().save(directory)
