"""GPT-J (EleutherAI, 2021): parallel residual after one norm, a part of each head rotated in neighbouring pairs, and a
bias on the logits."""

from jaxllm.interop.families import table as t
from jaxllm.interop.families.gpt2 import KEYS, write_activation
from jaxllm.interop.families.rope import interleaved

LAYER = "transformer.h.{layer}"

GPTJ = t.Family(
  "gptj",
  "GPTJForCausalLM",
  KEYS,
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
  activation="activation_function",
  gated=False,
  fields={"norm": "layernorm", "mlp_bias": True, "parallel_residual": True, "shared_norm": True, "head_bias": True},
  read=lambda hf: {"rope_fraction": hf["rotary_dim"] * hf["n_head"] / hf["n_embd"]},
  write=lambda c: write_activation(c) | {"rotary_dim": c.rotary_dim},
  prefix="transformer.",
)
