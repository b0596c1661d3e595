"""Falcon (arXiv 2311.16867): its first architecture (one key/value head, a parallel residual after one norm; ALiBi and
no parallel residual in the RefinedWeb models) and the one of 40B and 180B (key/value heads in groups, two norms)."""

from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import read_rope, write_rope

LAYER = "transformer.h.{layer}"


def _norms(c):
  if c.parallel_residual and not c.shared_norm:
    return t.norm("blocks/attention_norm", f"{LAYER}.ln_attn") + t.norm("blocks/mlp_norm", f"{LAYER}.ln_mlp")
  first = t.norm("blocks/attention_norm", f"{LAYER}.input_layernorm")
  return first + t.norm("blocks/mlp_norm", f"{LAYER}.post_attention_layernorm")


def _read(hf):
  new, heads = hf["new_decoder_architecture"], hf["num_attention_heads"]
  grouped = hf["num_kv_heads"] or heads
  alibi = {"position": "alibi", "alibi_scale": (hf["hidden_size"] / heads) ** -0.5}
  return (alibi if hf["alibi"] else read_rope(hf)) | {
    "num_kv_heads": grouped if new or not hf["multi_query"] else 1,
    "parallel_residual": new or hf["parallel_attn"],
    "shared_norm": hf["parallel_attn"] if not new else hf["num_ln_in_parallel_attn"] == 1,
  }


def _write(c):
  new = c.parallel_residual and (not c.shared_norm or 1 < c.num_kv_heads < c.num_heads)
  return (write_rope(c) if c.position == "rope" else {}) | {
    "alibi": c.position == "alibi",
    "new_decoder_architecture": new,
    "num_ln_in_parallel_attn": (1 if c.shared_norm else 2) if new else None,
    "num_kv_heads": c.num_kv_heads,
    "multi_query": c.num_kv_heads == 1,
    "parallel_attn": c.parallel_residual,
  }


FALCON = t.Family(
  "falcon",
  "FalconForCausalLM",
  t.KEYS | {"mlp_dim": "ffn_hidden_size", "norm_eps": "layer_norm_epsilon"} | dict.fromkeys(t.ALL_BIASES, "bias"),
  (
    t.embedding("embedding/tokens", "transformer.word_embeddings"),
    *t.linear(t.QKV, f"{LAYER}.self_attention.query_key_value", t.BY_HEAD),
    *t.linear("blocks/attention/output", f"{LAYER}.self_attention.dense"),
    *t.linears("blocks/mlp", f"{LAYER}.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
    *t.norm("final_norm", "transformer.ln_f"),
    *t.linear("head", "lm_head"),
  ),
  activation="activation",
  gated=False,
  fields={"norm": "layernorm"},
  read=_read,
  write=_write,
  prefix="transformer.",
  more_weights=_norms,
)
