"""Phi-3 (arXiv 2404.14219): Llama with fused query, key and value, and fused gate and up projections."""

import dataclasses

from jaxllm.base.errors import ConfigError
from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.interop.families.mistral import MISTRAL
from jaxllm.interop.families.rope import read_rope, rope_settings, write_rope


def _read(hf):
  settings = dict(rope_settings(hf))
  kind = settings.get("rope_type", settings.get("type", "default"))
  if kind not in ("default", "longrope", "su", "yarn"):  # the last two in its first files, for the same
    raise ConfigError(f"config.json has RoPE scaling of type {kind!r}; a phi3 has 'longrope' only")
  if kind != "default":  # the key beside it goes before its own
    original = hf["original_max_position_embeddings"]
    settings |= {"rope_type": "longrope", "original_max_position_embeddings": original}
  return read_rope(hf | {"rope_parameters": settings, "rope_scaling": None}, 1.0)


def _write(c):
  original = c.rope_scaling.original_max_seq_len if c.rope_scaling else c.max_seq_len
  # Its default padding token is of the published vocabulary, and may be outside ours.
  return write_rope(c) | {
    "partial_rotary_factor": c.rope_fraction,
    "original_max_position_embeddings": original,
    "pad_token_id": None,
  }


PHI3 = dataclasses.replace(
  MISTRAL,
  name="phi3",
  architecture="Phi3ForCausalLM",
  keys=llama.without("head_dim") | {"sliding_window": "sliding_window"},
  weights=(
    t.embedding("embedding/tokens", "model.embed_tokens"),
    *t.linear(t.QKV, f"{llama.LAYER}.self_attn.qkv_proj", t.ROWS),
    *t.linear("blocks/attention/output", f"{llama.LAYER}.self_attn.o_proj"),
    *llama.FUSED_MLP,
    *llama.PRE_NORMS,
    *t.norm("final_norm", "model.norm"),
    *t.linear("head", "lm_head"),
  ),
  read=_read,
  write=_write,
)
