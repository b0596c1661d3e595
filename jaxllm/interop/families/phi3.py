"""Phi-3 (arXiv 2404.14219): Llama with fused query, key and value, and fused gate and up projections."""

import dataclasses

from jaxllm.base.errors import ConfigError
from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t


def _read(hf):
  settings = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
  kind = settings.get("rope_type", settings.get("type", "default"))
  if kind not in ("default", "longrope", "su", "yarn"):  # the last two in its first files, for the same
    raise ConfigError(f"config.json has RoPE scaling of type {kind!r}; a phi3 has 'longrope' only")
  if kind != "default":
    known = {"rope_type": "longrope", "original_max_position_embeddings": hf["original_max_position_embeddings"]}
    settings = {"rope_theta": hf["rope_theta"]} | known | settings | {"rope_type": "longrope"}
  return llama.read_mistral({**hf, "rope_parameters": settings})


def _write(c):
  original = c.rope_scaling.original_max_seq_len if c.rope_scaling else c.max_seq_len
  # Its default padding token is of the published vocabulary, and may be outside ours.
  return llama.write_mistral(c) | {"original_max_position_embeddings": original, "pad_token_id": None}


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
  write=_write,
)
