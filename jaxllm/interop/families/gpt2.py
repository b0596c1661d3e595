"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, biases everywhere."""

from jaxllm.interop.families import table as t

LAYER = "transformer.h.{layer}"
KEYS = t.KEYS | {"embed_dim": "n_embd", "num_layers": "n_layer", "num_heads": "n_head", "mlp_dim": "n_inner"}
KEYS |= {"max_seq_len": "n_positions", "norm_eps": "layer_norm_epsilon"}


def write_activation(c):
  """GELU's approximation by its old name."""
  return {"activation_function": "gelu_new"} if c.mlp == "gelu_tanh" else {}


GPT2 = t.Family(
  "gpt2",
  "GPT2LMHeadModel",
  KEYS,
  (
    t.embedding("embedding/tokens", "transformer.wte"),
    t.embedding("embedding/positions", "transformer.wpe"),
    *t.norm("blocks/attention_norm", f"{LAYER}.ln_1"),
    *t.linear(t.QKV, f"{LAYER}.attn.c_attn", t.COLUMNS),
    *t.linear("blocks/attention/output", f"{LAYER}.attn.c_proj", t.SAME),
    *t.norm("blocks/mlp_norm", f"{LAYER}.ln_2"),
    *t.linear("blocks/mlp/up", f"{LAYER}.mlp.c_fc", t.SAME),
    *t.linear("blocks/mlp/down", f"{LAYER}.mlp.c_proj", t.SAME),
    *t.norm("final_norm", "transformer.ln_f"),
    *t.linear("head", "lm_head"),
  ),
  activation="activation_function",
  gated=False,
  fields=t.BIASED | {"position": "learned"},
  requires={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
  write=write_activation,
  prefix="transformer.",
)
