"""Phi-3 (arXiv 2404.14219): Llama with fused query, key and value, and fused gate and up projections."""

import dataclasses

from jaxllm.base.errors import ConfigError
from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t


def _read(hf):
  fields = llama.read_mistral(hf)
  if "rope_scaling" in fields:
    raise ConfigError("config.json has RoPE scaling; of Phi-3 only models without it can be read (4k, not 128k)")
  return fields


PHI3 = dataclasses.replace(
  llama.MISTRAL,
  name="phi3",
  architecture="Phi3ForCausalLM",
  keys={ours: theirs for ours, theirs in llama.KEYS.items() if ours != "head_dim"}
  | {"rope_fraction": "partial_rotary_factor"},
  weights=(
    t.embedding("embedding/tokens", "model.embed_tokens"),
    *t.linear(t.QKV, f"{llama.LAYER}.self_attn.qkv_proj", t.ROWS),
    *t.linear("blocks/attention/output", f"{llama.LAYER}.self_attn.o_proj"),
    *t.linear(("blocks/mlp/gate", "blocks/mlp/up"), f"{llama.LAYER}.mlp.gate_up_proj", t.ROWS),
    *t.linear("blocks/mlp/down", f"{llama.LAYER}.mlp.down_proj"),
    *llama.PRE_NORMS,
    *t.norm("final_norm", "model.norm"),
    *t.linear("head", "lm_head"),
  ),
  defaults=llama.DEFAULTS | {"partial_rotary_factor": 1.0},
  read=_read,
  # Its default padding token is of the published vocabulary, and may be outside ours.
  write=lambda c: llama.write_mistral(c) | {"original_max_position_embeddings": c.max_seq_len, "pad_token_id": None},
)
