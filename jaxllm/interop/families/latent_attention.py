"""Rows of latent attention, as DeepSeek's models have it (arXiv 2405.04434, section 2.1)."""

import numpy as np

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import in_pairs
from jaxllm.models.config import MLAConfig

KEYS = {
  "kv_lora_rank": "kv_lora_rank",
  "q_lora_rank": "q_lora_rank",
  "nope_head_dim": "qk_nope_head_dim",
  "rope_head_dim": "qk_rope_head_dim",
  "value_head_dim": "v_head_dim",
}


def _split_heads(c, x, shapes):
  heads = x.T.reshape(x.shape[1], c.num_heads, -1)
  return [part.reshape(len(part), -1) for part in np.split(heads, [c.mla.nope_head_dim], axis=-1)]


def _join_heads(c, weights):
  heads = [w.reshape(len(w), c.num_heads, -1) for w in weights]
  return np.concatenate(heads, axis=-1).reshape(len(weights[0]), -1).T


# What is rotated stands at the end, of each head and of the latent vector.
_QUERY = in_pairs(lambda c: (c.head_dim, slice(c.mla.nope_head_dim, None)))
_LATENT = in_pairs(lambda c: (c.mla.kv_lora_rank + c.mla.rope_head_dim, slice(c.mla.kv_lora_rank, None)))
_THEIRS = f"{llama.LAYER}.self_attn"
WEIGHTS = (
  *t.linear("blocks/attention/query", f"{_THEIRS}.q_proj", _QUERY),
  *t.linear("blocks/attention/query_down", f"{_THEIRS}.q_a_proj"),
  *t.norm("blocks/attention/query_norm", f"{_THEIRS}.q_a_layernorm"),
  *t.linear("blocks/attention/query_up", f"{_THEIRS}.q_b_proj", _QUERY),
  *t.linear("blocks/attention/latent", f"{_THEIRS}.kv_a_proj_with_mqa", _LATENT),
  *t.norm("blocks/attention/latent_norm", f"{_THEIRS}.kv_a_layernorm"),
  t.Weight(
    ("blocks/attention/key/weight", "blocks/attention/value/weight"),
    f"{_THEIRS}.kv_b_proj.weight",
    t.Transform(_split_heads, _join_heads),
  ),
  *t.linear("blocks/attention/output", f"{_THEIRS}.o_proj"),
)


def read(hf):
  # The norms of short vectors always have this epsilon, whatever config.json says of the others.
  return t.read_part(MLAConfig, hf, KEYS, norm_eps=1e-6)
