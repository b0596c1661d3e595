"""BART (arXiv 1910.13461): learned positions, norms after the sums, and a bias on the logits."""

from jaxllm.base.errors import ConfigError
from jaxllm.interop.families import table as t
from jaxllm.interop.families.bert import POST_NORM

ROW = t.Transform(lambda c, x, shapes: [x[0]], lambda c, weights: weights[0][None])  # a vector kept as [1, V]


def _attention(ours, theirs):
  return t.linears(ours, theirs, query="q_proj", key="k_proj", value="v_proj", output="out_proj")


def _stack(prefix, side, norm):
  layer = f"model.{side}.layers.{{layer}}"
  return (
    t.embedding(f"{prefix}embedding/positions", f"model.{side}.embed_positions"),
    *t.norm(f"{prefix}embedding/norm", f"model.{side}.layernorm_embedding"),
    *_attention(f"{prefix}blocks/attention", f"{layer}.self_attn"),
    *t.norm(f"{prefix}blocks/attention_{norm}", f"{layer}.self_attn_layer_norm"),
    *_attention(f"{prefix}blocks/cross_attention", f"{layer}.encoder_attn"),
    *t.norm(f"{prefix}blocks/cross_attention_{norm}", f"{layer}.encoder_attn_layer_norm"),
    *t.linears(f"{prefix}blocks/mlp", layer, up="fc1", down="fc2"),
    *t.norm(f"{prefix}blocks/mlp_{norm}", f"{layer}.final_layer_norm"),
    *t.norm(f"{prefix}final_norm", f"model.{side}.layer_norm"),
  )


def weights(norm):
  """`norm`: what the norms of the layers' parts are called here."""
  return (
    t.embedding("embedding/tokens", "model.shared"),
    *_stack("", "decoder", norm),
    *_stack("encoder/", "encoder", norm),
  )


def heads(c):
  """The logits' matrix and bias, or a classifier's of the state at the text's end, or an answer's span."""
  if c.head == "sequence":
    return t.linear("head/dense", "classification_head.dense") + t.linear("head", "classification_head.out_proj")
  if c.head == "span":
    return t.linear("head", "qa_outputs")
  matrix = t.Weight(("head/weight",), "lm_head.weight", t.TRANSPOSED)
  return matrix, t.Weight(("head/bias",), "final_logits_bias", ROW)


def architectures(name):
  return {"sequence": f"{name}ForSequenceClassification", "span": f"{name}ForQuestionAnswering"}


def read_heads(hf, name):
  fields = t.read_head(hf, architectures(name), labels=3 if name == "Bart" else 2)
  return read(hf) | fields | ({"head_dense": "tanh", "pooling": "last"} if fields["head"] == "sequence" else {})


def read(hf):
  for size in ("attention_heads", "ffn_dim"):
    if hf[f"encoder_{size}"] != hf[f"decoder_{size}"]:
      raise ConfigError(
        f"config.json has encoder_{size} {hf[f'encoder_{size}']} and decoder_{size} {hf[f'decoder_{size}']}; "
        "a model here has one size of both"
      )
  return {
    "mlp": t.mlp_name(hf["activation_function"], gated=False),
    "embedding_scale": hf["d_model"] ** 0.5 if hf["scale_embedding"] else None,
  }


def _write(c):
  return {
    "is_encoder_decoder": True,
    "encoder_attention_heads": c.num_heads,
    "encoder_ffn_dim": c.mlp_dim,
    "activation_function": t.activation_name(c.mlp),
    "scale_embedding": c.embedding_scale is not None,
  }


BART = t.Family(
  "bart",
  "BartForConditionalGeneration",
  {
    "vocab_size": "vocab_size",
    "embed_dim": "d_model",
    "num_layers": "decoder_layers",
    "num_encoder_layers": "encoder_layers",
    "num_heads": "decoder_attention_heads",
    "mlp_dim": "decoder_ffn_dim",
    "max_seq_len": "max_position_embeddings",
    "decoder_start_id": "decoder_start_token_id",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "init_std",
  },
  weights("post_norm"),
  fields=POST_NORM | {"architecture": "encoder_decoder", "position_offset": 2, "head_bias": True},
  requires={"is_encoder_decoder": True, "normalize_before": False, "add_final_layer_norm": False},
  read=lambda hf: read_heads(hf, "Bart"),
  write=lambda c: _write(c) | t.write_labels(c),
  architectures=architectures("Bart"),
  more_weights=heads,
  copies={f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in ("encoder", "decoder")},
  own_copies=True,
  zeros=("final_logits_bias",),
)
