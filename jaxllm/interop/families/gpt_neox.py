"""GPT-NeoX and Pythia (arXiv 2204.06745): parallel residual, RoPE on a part of each head."""

from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import read_rope, write_rope

LAYER = "gpt_neox.layers.{layer}"


def _read(hf):
  rope = hf | {"rope_theta": hf["rotary_emb_base"], "partial_rotary_factor": hf["rotary_pct"]}
  return read_rope(rope, 1.0)


def _write(c):
  rope = write_rope(c)
  scaling = {"rope_scaling": rope["rope_scaling"]} if c.rope_scaling else {}
  return scaling | {"rotary_emb_base": c.rope_theta, "rotary_pct": c.rope_fraction}


GPT_NEOX = t.Family(
  "gpt_neox",
  "GPTNeoXForCausalLM",
  t.KEYS | t.BIASES | {"norm_eps": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
  (
    t.embedding("embedding/tokens", "gpt_neox.embed_in"),
    *t.norm("blocks/attention_norm", f"{LAYER}.input_layernorm"),
    *t.linear(t.QKV, f"{LAYER}.attention.query_key_value", t.BY_HEAD),
    *t.linear("blocks/attention/output", f"{LAYER}.attention.dense"),
    *t.norm("blocks/mlp_norm", f"{LAYER}.post_attention_layernorm"),
    *t.linears("blocks/mlp", f"{LAYER}.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
    *t.norm("final_norm", "gpt_neox.final_layer_norm"),
    *t.linear("head", "embed_out"),
  ),
  gated=False,
  fields={"norm": "layernorm", "mlp_bias": True},
  defaults={"rotary_emb_base": 10000.0, "rotary_pct": 0.25},
  read=_read,
  write=_write,
  other_names=t.linear("head", "lm_head"),  # as transformers has it in memory
  prefix="gpt_neox.",
  head="embed_out.weight",
)
