"""GPT-NeoX and Pythia (arXiv 2204.06745): parallel residual, RoPE on a part of each head."""

from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import read_rope, write_rope

LAYER = "gpt_neox.layers.{layer}"


def _read(hf):
  rope = {"rope_theta": hf["rotary_emb_base"], "partial_rotary_factor": hf["rotary_pct"]} | hf
  return read_rope(rope) | {
    "mlp": t.mlp_name(hf["hidden_act"], gated=False),
    "parallel_residual": hf["use_parallel_residual"],
    "attention_bias": hf["attention_bias"],
    "attention_out_bias": hf["attention_bias"],
  }


def _write(c):
  rope = write_rope(c)
  scaling = {"rope_scaling": rope["rope_scaling"]} if c.rope_scaling else {}
  return scaling | {
    "rotary_emb_base": c.rope_theta,
    "rotary_pct": c.rope_fraction,
    "hidden_act": t.activation_name(c.mlp),
    "use_parallel_residual": c.parallel_residual,
    "attention_bias": c.attention_bias,
  }


GPT_NEOX = t.Family(
  "gpt_neox",
  "GPTNeoXForCausalLM",
  {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
  },
  (
    t.embedding("embedding/tokens", "gpt_neox.embed_in"),
    *t.norm("blocks/attention_norm", f"{LAYER}.input_layernorm"),
    *t.linear(
      ("blocks/attention/query", "blocks/attention/key", "blocks/attention/value"),
      f"{LAYER}.attention.query_key_value",
      t.BY_HEAD,
    ),
    *t.linear("blocks/attention/output", f"{LAYER}.attention.dense"),
    *t.norm("blocks/mlp_norm", f"{LAYER}.post_attention_layernorm"),
    *t.linear("blocks/mlp/up", f"{LAYER}.mlp.dense_h_to_4h"),
    *t.linear("blocks/mlp/down", f"{LAYER}.mlp.dense_4h_to_h"),
    *t.norm("final_norm", "gpt_neox.final_layer_norm"),
    *t.linear("head", "embed_out"),
  ),
  fields={"norm": "layernorm", "mlp_bias": True},
  defaults={
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "use_parallel_residual": True,
    "attention_bias": True,
    "rotary_emb_base": 10000.0,
    "rotary_pct": 0.25,
  },
  read=_read,
  write=_write,
  other_names=t.linear("head", "lm_head"),  # as transformers has it in memory
  prefix="gpt_neox.",
  head="embed_out.weight",
)
