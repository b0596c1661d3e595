"""GPT-J (EleutherAI, 2021): parallel residual after one norm, a part of each head rotated in neighbouring pairs, and a
bias on the logits."""

from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import interleaved

LAYER = "transformer.h.{layer}"


def _read(hf):
  return {
    "mlp": t.mlp_name(hf["activation_function"], gated=False),
    "rope_fraction": hf["rotary_dim"] * hf["n_head"] / hf["n_embd"],
  }


def _write(c):
  activation = "gelu_new" if c.mlp == "gelu_tanh" else t.activation_name(c.mlp)
  return {"activation_function": activation, "rotary_dim": c.rotary_dim}


GPTJ = t.Family(
  "gptj",
  "GPTJForCausalLM",
  {
    "vocab_size": "vocab_size",
    "embed_dim": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "mlp_dim": "n_inner",
    "max_seq_len": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
  },
  interleaved(
    (
      t.embedding("embedding/tokens", "transformer.wte"),
      *t.norm("blocks/attention_norm", f"{LAYER}.ln_1"),
      *t.linears("blocks/attention", f"{LAYER}.attn", query="q_proj", key="k_proj", value="v_proj", output="out_proj"),
      *t.linears("blocks/mlp", f"{LAYER}.mlp", up="fc_in", down="fc_out"),
      *t.norm("final_norm", "transformer.ln_f"),
      *t.linear("head", "lm_head"),
    )
  ),
  fields={"norm": "layernorm", "mlp_bias": True, "parallel_residual": True, "shared_norm": True, "head_bias": True},
  read=_read,
  write=_write,
  prefix="transformer.",
)
