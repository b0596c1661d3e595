"""BART (arXiv 1910.13461): learned positions, norms after the sums, and a bias on the logits."""

from jaxllm.base.errors import ConfigError
from jaxllm.interop.families import table as t
from jaxllm.interop.families.bert import POST_NORM

ROW = t.Transform(lambda c, x, shapes: [x[0]], lambda c, weights: weights[0][None])  # a vector kept as [1, V]
ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
HEADS = {
  "lm": (*t.linear("head", "lm_head")[:1], t.Weight(("head/bias",), "final_logits_bias", ROW)),
  "sequence": t.linear("head/dense", "classification_head.dense") + t.linear("head", "classification_head.out_proj"),
  "span": t.linear("head", "qa_outputs"),
}
KEYS = {"embed_dim": "d_model", "num_layers": "decoder_layers", "num_encoder_layers": "encoder_layers"}
KEYS |= {"num_heads": "decoder_attention_heads", "mlp_dim": "decoder_ffn_dim", "init_std": "init_std"}


def _stack(prefix, side, norm):
  layer = f"model.{side}.layers.{{layer}}"
  return (
    t.embedding(f"{prefix}embedding/positions", f"model.{side}.embed_positions"),
    *t.norm(f"{prefix}embedding/norm", f"model.{side}.layernorm_embedding"),
    *t.linears(f"{prefix}blocks/attention", f"{layer}.self_attn", **ATTENTION),
    *t.norm(f"{prefix}blocks/attention_{norm}", f"{layer}.self_attn_layer_norm"),
    *t.linears(f"{prefix}blocks/cross_attention", f"{layer}.encoder_attn", **ATTENTION),
    *t.norm(f"{prefix}blocks/cross_attention_{norm}", f"{layer}.encoder_attn_layer_norm"),
    *t.linears(f"{prefix}blocks/mlp", layer, up="fc1", down="fc2"),
    *t.norm(f"{prefix}blocks/mlp_{norm}", f"{layer}.final_layer_norm"),
    *t.norm(f"{prefix}final_norm", f"model.{side}.layer_norm"),
  )


def weights(norm):
  """`norm`: what the norms of the layers' parts are called here."""
  table = t.embedding("embedding/tokens", "model.shared")
  return table, *_stack("", "decoder", norm), *_stack("encoder/", "encoder", norm)


def read(hf):
  for size in ("attention_heads", "ffn_dim"):
    one, other = hf[f"encoder_{size}"], hf[f"decoder_{size}"]
    if one != other:
      both = f"encoder_{size} {one} and decoder_{size} {other}"
      raise ConfigError(f"config.json has {both}; a model here has one size of both")
  return {"embedding_scale": hf["d_model"] ** 0.5 if hf["scale_embedding"] else None}


def _write(c):
  return {
    "is_encoder_decoder": True,
    "encoder_attention_heads": c.num_heads,
    "encoder_ffn_dim": c.mlp_dim,
    "scale_embedding": c.embedding_scale is not None,
  }


BART = t.Family(
  "bart",
  "BartForConditionalGeneration",
  t.KEYS | KEYS | {"decoder_start_id": "decoder_start_token_id"},
  weights("post_norm"),
  activation="activation_function",
  gated=False,
  fields=POST_NORM | {"architecture": "encoder_decoder", "position_offset": 2, "head_bias": True},
  requires={"is_encoder_decoder": True, "normalize_before": False, "add_final_layer_norm": False},
  by_head={"sequence": {"head_dense": "tanh", "pooling": "last"}, "span": {}},
  read=read,
  write=_write,
  architectures=t.classes("Bart", "sequence", "span"),
  labels=3,
  more_weights=lambda c: HEADS[c.head],
  copies={f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in ("encoder", "decoder")},
  own_copies=True,
  zeros=("final_logits_bias",),
)
