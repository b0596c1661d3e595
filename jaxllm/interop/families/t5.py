"""T5 (arXiv 1910.10683), T5 1.1, FLAN-T5 (2210.11416), and mT5 (2010.11934), whose logits are never scaled; and their
encoders alone, as in Sentence-T5 (2108.08877) and GTR (2112.07899)."""

import dataclasses

from jaxllm.base.errors import ConfigError
from jaxllm.interop.families import table as t
from jaxllm.models.config import MLPS


def _attention(ours, theirs):
  return t.linears(ours, theirs, query="q", key="k", value="v", output="o")


def _stack(c, ours, side):
  """The layers of one side, in which the feed-forward's matrices go by other names where there is a gate."""
  layer, mlp = f"{side}.block.{{layer}}.layer", 2 if side == "decoder" else 1
  names = {"gate": "wi_0", "up": "wi_1" if MLPS[c.mlp][1] else "wi", "down": "wo"}
  return (
    t.embedding(f"{ours}relative_bias", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"),
    *_attention(f"{ours}blocks/attention", f"{layer}.0.SelfAttention"),
    *t.norm(f"{ours}blocks/attention_norm", f"{layer}.0.layer_norm"),
    *_attention(f"{ours}blocks/cross_attention", f"{layer}.1.EncDecAttention"),
    *t.norm(f"{ours}blocks/cross_attention_norm", f"{layer}.1.layer_norm"),
    *t.linears(f"{ours}blocks/mlp", f"{layer}.{mlp}.DenseReluDense", **names),
    *t.norm(f"{ours}blocks/mlp_norm", f"{layer}.{mlp}.layer_norm"),
    *t.norm(f"{ours}final_norm", f"{side}.final_layer_norm"),
  )


def _weights(c):
  if c.architecture == "encoder":
    return _stack(c, "", "encoder")
  head = t.linear("head", "qa_outputs" if c.head == "span" else "lm_head")
  return _stack(c, "", "decoder") + _stack(c, "encoder/", "encoder") + head


def _read(hf, stem):
  kind = hf["feed_forward_proj"]
  gated = hf.get("is_gated_act", kind.startswith("gated-"))
  activation = hf.get("dense_act_fn", "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-"))
  fields = {"mlp": t.mlp_name(activation, gated)}
  scaled = hf.get("scale_decoder_outputs", hf["tie_word_embeddings"]) and stem == "T5"
  if (hf.get("architectures") or [None])[0] == f"{stem}EncoderModel":
    layers = {"num_layers": hf["num_layers"], "num_encoder_layers": 0}
    return fields | layers | {"architecture": "encoder", "head": "none", "decoder_start_id": 0}
  if not hf.get("is_encoder_decoder", True):
    raise ConfigError(f"config.json has is_encoder_decoder = False, and is not of a {stem}EncoderModel")
  fields |= t.read_head(hf, {"span": f"{stem}ForQuestionAnswering"})
  if fields["head"] == "span":
    return fields | {"head_bias": True}
  return fields | {"logit_scale": hf["d_model"] ** -0.5 if scaled else None}


def _write(c, stem):
  kind = t.activation_name(c.mlp)
  if MLPS[c.mlp][1]:
    kind = "gated-" + {"gelu_pytorch_tanh": "gelu", "gelu": "gelu_python"}.get(kind, kind)
  if c.architecture == "encoder":
    layers = {"num_layers": c.num_layers, "num_decoder_layers": c.num_layers}
    return layers | {"architectures": [f"{stem}EncoderModel"], "feed_forward_proj": kind, "is_encoder_decoder": False}
  scaled = {"scale_decoder_outputs": c.logit_scale is not None} if stem == "T5" and c.head == "lm" else {}
  return scaled | {"feed_forward_proj": kind, "is_encoder_decoder": True}


def _classes(stem):
  """What hangs on the names of the classes in transformers."""
  return {
    "architecture": f"{stem}ForConditionalGeneration",
    "architectures": {"span": f"{stem}ForQuestionAnswering"},
    "others": (f"{stem}EncoderModel",),
    "read": lambda hf: _read(hf, stem),
    "write": lambda c: _write(c, stem),
  }


T5 = t.Family(
  name="t5",
  keys={
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
  weights=(t.embedding("embedding/tokens", "shared"),),
  fields={"architecture": "encoder_decoder", "position": "relative", "query_scale": 1.0, "init": "fan_in"},
  defaults={"n_positions": 512, "decoder_start_token_id": 0, "tie_word_embeddings": True},
  types={"is_encoder_decoder": bool},
  requires={"is_decoder": False},
  prefix="",
  more_weights=_weights,
  follows={"num_decoder_layers": "num_layers"},
  copies={f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")},
  ignored=("*.EncDecAttention.relative_attention_bias.weight",),  # the first checkpoints have it, and no code reads it
  **_classes("T5"),
)
MT5 = dataclasses.replace(T5, name="mt5", **_classes("MT5"))
