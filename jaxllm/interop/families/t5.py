"""T5 (arXiv 1910.10683), T5 1.1, FLAN-T5 (2210.11416), and mT5 (2010.11934), whose logits are never scaled."""

import dataclasses

from jaxllm.interop.families import table as t
from jaxllm.models.config import MLPS

ENCODER, DECODER = "encoder.block.{layer}.layer", "decoder.block.{layer}.layer"
RELATIVE = "block.0.layer.0.SelfAttention.relative_attention_bias"


def _attention(ours, theirs):
  return t.linears(ours, theirs, query="q", key="k", value="v", output="o")


def _mlp(c):
  """The matrix before the product goes by another name where there is a gate."""
  names = {"gate": "wi_0", "up": "wi_1" if MLPS[c.mlp][1] else "wi"}
  decoder = t.linears("blocks/mlp", f"{DECODER}.2.DenseReluDense", **names)
  return decoder + t.linears("encoder/blocks/mlp", f"{ENCODER}.1.DenseReluDense", **names)


def _read(hf):
  kind = hf["feed_forward_proj"]
  gated = hf.get("is_gated_act", kind.startswith("gated-"))
  activation = hf.get("dense_act_fn", "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-"))
  scaled = hf.get("scale_decoder_outputs", hf["tie_word_embeddings"])
  return {
    "mlp": t.mlp_name(activation, gated),
    "logit_scale": hf["d_model"] ** -0.5 if scaled else None,
  }


def _write(c):
  kind = t.activation_name(c.mlp)
  if MLPS[c.mlp][1]:
    kind = "gated-" + {"gelu_pytorch_tanh": "gelu", "gelu": "gelu_python"}.get(kind, kind)
  return {"feed_forward_proj": kind, "scale_decoder_outputs": c.logit_scale is not None, "is_encoder_decoder": True}


T5 = t.Family(
  "t5",
  "T5ForConditionalGeneration",
  {
    "vocab_size": "vocab_size",
    "embed_dim": "d_model",
    "num_layers": "num_decoder_layers",
    "num_encoder_layers": "num_layers",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "mlp_dim": "d_ff",
    "max_seq_len": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "relative_buckets": "relative_attention_num_buckets",
    "relative_max_distance": "relative_attention_max_distance",
    "decoder_start_id": "decoder_start_token_id",
    "tie_embeddings": "tie_word_embeddings",
  },
  (
    t.embedding("embedding/tokens", "shared"),
    t.embedding("relative_bias", f"decoder.{RELATIVE}"),
    *_attention("blocks/attention", f"{DECODER}.0.SelfAttention"),
    *t.norm("blocks/attention_norm", f"{DECODER}.0.layer_norm"),
    *_attention("blocks/cross_attention", f"{DECODER}.1.EncDecAttention"),
    *t.norm("blocks/cross_attention_norm", f"{DECODER}.1.layer_norm"),
    *t.linear("blocks/mlp/down", f"{DECODER}.2.DenseReluDense.wo"),
    *t.norm("blocks/mlp_norm", f"{DECODER}.2.layer_norm"),
    *t.norm("final_norm", "decoder.final_layer_norm"),
    t.embedding("encoder/relative_bias", f"encoder.{RELATIVE}"),
    *_attention("encoder/blocks/attention", f"{ENCODER}.0.SelfAttention"),
    *t.norm("encoder/blocks/attention_norm", f"{ENCODER}.0.layer_norm"),
    *t.linear("encoder/blocks/mlp/down", f"{ENCODER}.1.DenseReluDense.wo"),
    *t.norm("encoder/blocks/mlp_norm", f"{ENCODER}.1.layer_norm"),
    *t.norm("encoder/final_norm", "encoder.final_layer_norm"),
    *t.linear("head", "lm_head"),
  ),
  fields={"architecture": "encoder_decoder", "position": "relative", "query_scale": 1.0, "init": "fan_in"},
  defaults={"n_positions": 512, "decoder_start_token_id": 0, "tie_word_embeddings": True},
  requires={"is_decoder": False, "is_encoder_decoder": True},
  read=_read,
  write=_write,
  prefix="",
  more_weights=_mlp,
  follows={"num_decoder_layers": "num_layers"},
  copies={f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")},
  ignored=("*.EncDecAttention.relative_attention_bias.weight",),  # the first checkpoints have it, and no code reads it
)
MT5 = dataclasses.replace(
  T5,
  name="mt5",
  architecture="MT5ForConditionalGeneration",
  read=lambda hf: T5.read(hf) | {"logit_scale": None},
  write=lambda c: {key: value for key, value in _write(c).items() if key != "scale_decoder_outputs"},
)
