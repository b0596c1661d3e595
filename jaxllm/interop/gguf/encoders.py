"""GGUF's architectures with an encoder, and what llama.cpp has of such models."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.gguf.table import Architecture
from jaxllm.interop.huggingface import config_from_huggingface, config_to_huggingface, from_huggingface, to_huggingface
from jaxllm.interop.tensors import LazyTensor, Tensors

log = logging.getLogger("jaxllm")
# llama.cpp has no heads of encoders: ELECTRA's bare model is BERT's without a pooler.
WRITTEN_AS = dict.fromkeys(("bert", "camembert", "data2vec-text", "electra", "roberta", "xlm-roberta"), "electra")
WRITTEN_AS |= {"distilbert": "distilbert", "modernbert": "modernbert", "t5": "t5", "mt5": "t5", "gemma3": "gemma3_text"}
_DISTILBERT_EPS = 1e-12  # which its config.json cannot say
TYPE_TABLE, LABELS = "token_types.weight", "cls.output.weight"


def reduced(hf: Mapping[str, Any], tensors: Tensors) -> tuple[Mapping[str, Any], Tensors]:
  """What llama.cpp can have of a checkpoint, as one of a family that has a table; what is lost is logged.

  Of an encoder: the states of its tokens, or the labels of a text; positions counted from 0. Of a decoder without a
  head: one whose head is its embedding. Of a model with a vision tower: the text's. T5's factor of the logits goes into
  its last norm.

  Raises:
    ConfigError: the head is what the model is for.
    CheckpointError: tensors that do not fit the config.
  """
  family = hf["model_type"]
  c, target = config_from_huggingface(hf), WRITTEN_AS.get(family, family)
  encoder = c.architecture == "encoder"
  ranks = encoder and c.head == "sequence" and c.head_dense == "tanh" and target == "electra"
  if c.head not in ("lm", "none") and not ranks:
    raise ConfigError(f"GGUF has no place for the head of {hf['architectures'][0]}; write the model without it")
  bare_decoder = c.architecture == "decoder" and c.head == "none"
  if target == family and c.architecture == "decoder" and not bare_decoder:
    return hf, tensors
  if c.token_dim != c.embed_dim:
    raise ConfigError("GGUF has no place for an embedding that is narrower than the model")
  bare = dataclasses.replace(c, logit_scale=None) if c.architecture == "encoder_decoder" else c
  if ranks:
    target, bare = "bert", dataclasses.replace(bare, position_offset=0, position_pad_id=None)
  elif encoder:
    none: dict[str, Any] = {"head": "none", "head_dense": None, "head_norm": False, "head_bias": False}
    bare = dataclasses.replace(bare, **none, position_offset=0, position_pad_id=None, pooling="first")
  elif bare_decoder:
    log.warning("GGUF: the model has no head, and llama.cpp takes the embedding for one; the file is for embeddings")
    bare = dataclasses.replace(bare, head="lm", tie_embeddings=True)
  config_to_huggingface(bare, target)
  params = dict(from_huggingface(hf, tensors)[1])
  if encoder:
    if lost := [path for path in params if path.startswith("head/") and not ranks]:
      log.warning("GGUF: llama.cpp has no head of a masked language model and no pooler; the file is for embeddings")
    params = {path: tensor for path, tensor in params.items() if path not in lost}
    if c.position_offset:
      params["embedding/positions"] = _without_rows(params["embedding/positions"], c.position_offset)
  elif c.logit_scale is not None and bare.logit_scale is None:
    params["final_norm/scale"] = _times(params["final_norm/scale"], c.logit_scale)
  found, named = to_huggingface(bare, target, params)
  return found | ({"id2label": hf["id2label"]} if ranks and "id2label" in hf else {}), named


def _without_rows(x: LazyTensor, count: int) -> LazyTensor:
  return LazyTensor((x.shape[0] - count, *x.shape[1:]), x.dtype, lambda: x.read()[count:])


def _times(x: LazyTensor, factor: float) -> LazyTensor:
  return LazyTensor(x.shape, np.dtype("float32"), lambda: x.read().astype(np.float32) * np.float32(factor))


def _read_bert(m):
  width = {"embedding_size": m.positive("embedding_length")}
  return {"architectures": ["ElectraModel"], "type_vocab_size": m.tensors[TYPE_TABLE].shape[0]} | width


def _read_distilbert(m):
  eps = m.number("attention.layer_norm_epsilon")
  if eps is None or not math.isclose(eps, _DISTILBERT_EPS, rel_tol=1e-6):
    raise CheckpointError(f"the GGUF file's encoder has no kinds of segments and an epsilon of {eps}, not 1e-12")
  return {"architectures": ["DistilBertModel"]}


def _read_modernbert(m):
  if (kind := m.text("rope.scaling.type") or "none") != "none":
    raise CheckpointError(f"the GGUF file has RoPE scaling of type {kind!r}, which a modern-bert here has not")
  theta, window = m.number("rope.freq_base", 10000.0), m.number("attention.sliding_window", 0)
  # llama.cpp's pattern begins with a layer that sees everything
  every = m.number("attention.sliding_window_pattern", 3) if window else 1
  types = ["sliding_attention" if every == 0 or i % every else "full_attention" for i in range(m.number("block_count"))]
  local = m.number("rope.freq_base_swa", theta)
  return {
    "architectures": ["ModernBertModel"],
    "layer_types": types,
    "local_attention": window or 128,
    "rope_parameters": {"full_attention": {"rope_theta": theta}, "sliding_attention": {"rope_theta": local}},
  }


def _write_modernbert(hf):
  numbers = {"rope.freq_base": hf["global_rope_theta"], "rope.freq_base_swa": hf["local_rope_theta"]}
  windows = {"attention.sliding_window": hf["local_attention"], "attention.sliding_window_pattern": 3}
  local = "sliding_attention" in hf["layer_types"]
  return {"attention.causal": False, "rope.scaling.type": "none"} | numbers | (windows if local else {})


def _read_ranker(m):
  names = m.texts("classifier.output_labels") or [f"LABEL_{i}" for i in range(m.tensors[LABELS].shape[0])]
  types = m.tensors[TYPE_TABLE].shape[0] if TYPE_TABLE in m.tensors else 0
  return {
    "architectures": ["BertForSequenceClassification"],
    "id2label": {str(i): name for i, name in enumerate(names)},
    "type_vocab_size": types,
  }


_POST_NORMS = {
  "blocks/attention_post_norm": "blk.{}.attn_output_norm",
  "blocks/mlp_post_norm": "blk.{}.layer_output_norm",
}
_T5_GATE = "dec.blk.0.ffn_gate.weight"


def _t5_stems(c):
  stems = {"relative_bias": "dec.blk.0.attn_rel_b.weight", "encoder/relative_bias": "enc.blk.0.attn_rel_b.weight"}
  stems |= {"final_norm": "dec.output_norm", "encoder/final_norm": "enc.output_norm"}
  parts = {"query": "q", "key": "k", "value": "v", "output": "o"}
  for side, ours in (("dec", "blocks"), ("enc", "encoder/blocks")):
    stems |= {f"{ours}/attention/{part}": f"{side}.blk.{{}}.attn_{theirs}" for part, theirs in parts.items()}
    stems |= {f"{ours}/mlp/{part}": f"{side}.blk.{{}}.ffn_{part}" for part in ("gate", "up", "down")}
    stems |= {f"{ours}/attention_norm": f"{side}.blk.{{}}.attn_norm", f"{ours}/mlp_norm": f"{side}.blk.{{}}.ffn_norm"}
  stems |= {f"blocks/cross_attention/{part}": f"dec.blk.{{}}.cross_attn_{theirs}" for part, theirs in parts.items()}
  return stems | {"blocks/cross_attention_norm": "dec.blk.{}.cross_attn_norm"}


def _read_t5(m):
  tied = "output.weight" not in m.tensors
  return {
    "feed_forward_proj": "gated-gelu" if _T5_GATE in m.tensors else "relu",
    # llama.cpp multiplies no logits; a file of ours has the factor in its last norm, and says so.
    "scale_decoder_outputs": tied and m.number("logit_scale") is None,
    "decoder_start_token_id": m.number("decoder_start_token_id", 0),
  }


def _write_t5(hf):
  if hf["num_decoder_layers"] > hf["num_layers"]:
    raise ConfigError("llama.cpp has no T5 model whose decoder has more layers than its encoder")
  scale = {"logit_scale": 1.0} if hf["tie_word_embeddings"] else {}
  return {"decoder_start_token_id": hf["decoder_start_token_id"]} | scale


_BERT = Architecture(
  "bert",
  "electra",
  rope=False,
  activation="hidden_act",
  stems=lambda c: _POST_NORMS,
  read=_read_bert,
  write=lambda hf: {"attention.causal": False},
)
ENCODERS = (
  _BERT,
  dataclasses.replace(
    _BERT,
    model_type="bert",
    stems=lambda c: _POST_NORMS | {"head/dense": "cls", "head": "cls.output"},
    read=_read_ranker,
  ),
  dataclasses.replace(
    _BERT,
    model_type="distilbert",
    activation="activation",
    read=_read_distilbert,
    write=lambda hf: {"attention.causal": False, "attention.layer_norm_epsilon": _DISTILBERT_EPS},
  ),
  Architecture(
    "modern-bert",
    "modernbert",
    rope=False,
    activation="hidden_activation",
    activations=("gelu", "gelu_tanh", "silu"),  # which llama.cpp reads here
    only={"attention_bias": False, "mlp_bias": False, "norm_bias": False},
    read=_read_modernbert,
    write=_write_modernbert,
  ),
  Architecture(
    "t5",
    "t5",
    rope=False,
    fields={
      "block_count": "num_encoder_layers",
      "decoder_block_count": "num_layers",
      "attention.relative_buckets_count": "relative_buckets",
    },
    only={"relative_attention_max_distance": 128},
    stems=_t5_stems,
    blocks="enc.blk.",
    read=_read_t5,
    write=_write_t5,
  ),
)
