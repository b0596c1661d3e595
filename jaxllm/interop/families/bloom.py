"""BLOOM (arXiv 2211.05100): ALiBi and a norm after the embedding."""

from jaxllm.interop.families import table as t

LAYER = "transformer.h.{layer}"

BLOOM = t.Family(
  "bloom",
  "BloomForCausalLM",
  {ours: theirs for ours, theirs in t.KEYS.items() if ours != "mlp_dim"}
  | {"num_layers": "n_layer", "num_heads": "n_head", "max_seq_len": "seq_length", "norm_eps": "layer_norm_epsilon"},
  (
    t.embedding("embedding/tokens", "transformer.word_embeddings"),
    *t.norm("embedding/norm", "transformer.word_embeddings_layernorm"),
    *t.norm("blocks/attention_norm", f"{LAYER}.input_layernorm"),
    *t.linear(t.QKV, f"{LAYER}.self_attention.query_key_value", t.BY_HEAD),
    *t.linear("blocks/attention/output", f"{LAYER}.self_attention.dense"),
    *t.norm("blocks/mlp_norm", f"{LAYER}.post_attention_layernorm"),
    *t.linears("blocks/mlp", f"{LAYER}.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
    *t.norm("final_norm", "transformer.ln_f"),
    *t.linear("head", "lm_head"),
  ),
  activation=None,
  fields=t.BIASED | {"position": "alibi", "embedding_norm": True, "mlp": "gelu_tanh"},
  defaults={"seq_length": 2048},
  requires={"apply_residual_connection_post_layernorm": False},
  prefix="transformer.",
)
