"""DeepSeek-V2 (arXiv 2405.04434) and V3 (2412.19437): latent attention and experts."""

import dataclasses

import numpy as np

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.interop.families.moe import ROUTER, SEPARATE, STACKED
from jaxllm.interop.families.rope import read_rope, write_rope
from jaxllm.models.config import MLAConfig, MoEConfig


def _reorder(c, x, width, inverse=False):
  """The rotated dimensions at the end of every `width` of the last axis: theirs in pairs (0, 1), (2, 3), …,
  ours with the first of all pairs before the second of all, as `apply_rope` rotates them."""
  heads = x.reshape(*x.shape[:-1], -1, width)
  plain, rotated = np.split(heads, [width - c.mla.rope_head_dim], axis=-1)
  pairs = (2, -1) if inverse else (-1, 2)
  rotated = np.swapaxes(rotated.reshape(*rotated.shape[:-1], *pairs), -1, -2).reshape(rotated.shape)
  return np.concatenate([plain, rotated], axis=-1).reshape(x.shape)


def _rotated(width):
  return t.Transform(
    lambda c, x, shapes: [_reorder(c, t.transposed(x), width(c))],
    lambda c, weights: t.transposed(_reorder(c, weights[0], width(c), inverse=True)),
  )


def _split_heads(c, x, shapes):
  heads = x.T.reshape(x.shape[1], c.num_heads, -1)
  return [part.reshape(len(part), -1) for part in np.split(heads, [c.mla.nope_head_dim], axis=-1)]


def _join_heads(c, weights):
  heads = [w.reshape(len(w), c.num_heads, -1) for w in weights]
  return np.concatenate(heads, axis=-1).reshape(len(weights[0]), -1).T


QUERY = _rotated(lambda c: c.head_dim)
LATENT = _rotated(lambda c: c.mla.kv_lora_rank + c.mla.rope_head_dim)
ATTENTION = f"{llama.LAYER}.self_attn"
WEIGHTS = (
  *(w for w in llama.WEIGHTS if not w.ours[0].startswith("blocks/attention/")),
  *t.linear("blocks/attention/query", f"{ATTENTION}.q_proj", QUERY),
  *t.linear("blocks/attention/query_down", f"{ATTENTION}.q_a_proj"),
  *t.norm("blocks/attention/query_norm", f"{ATTENTION}.q_a_layernorm"),
  *t.linear("blocks/attention/query_up", f"{ATTENTION}.q_b_proj", QUERY),
  *t.linear("blocks/attention/latent", f"{ATTENTION}.kv_a_proj_with_mqa", LATENT),
  *t.norm("blocks/attention/latent_norm", f"{ATTENTION}.kv_a_layernorm"),
  t.Weight(
    ("blocks/attention/key/weight", "blocks/attention/value/weight"),
    f"{ATTENTION}.kv_b_proj.weight",
    t.Transform(_split_heads, _join_heads),
  ),
  *t.linear("blocks/attention/output", f"{ATTENTION}.o_proj"),
  ROUTER,
  t.Weight(("blocks/moe/correction_bias",), f"{llama.LAYER}.mlp.gate.e_score_correction_bias"),
  *SEPARATE,
  *t.linears(
    "blocks/moe/shared", f"{llama.LAYER}.mlp.shared_experts", gate="gate_proj", up="up_proj", down="down_proj"
  ),
)
MLA_KEYS = {
  "kv_lora_rank": "kv_lora_rank",
  "q_lora_rank": "q_lora_rank",
  "nope_head_dim": "qk_nope_head_dim",
  "rope_head_dim": "qk_rope_head_dim",
  "value_head_dim": "v_head_dim",
}
MOE_KEYS = {
  "num_experts": "n_routed_experts",
  "top_k": "num_experts_per_tok",
  "mlp_dim": "moe_intermediate_size",
  "first_dense_layers": "first_k_dense_replace",
  "scale": "routed_scaling_factor",
  "normalize": "norm_topk_prob",
}


def _read(hf, **moe):
  shared = hf["n_shared_experts"] * hf["moe_intermediate_size"]
  return read_rope(hf) | {
    "mlp": t.mlp_name(hf["hidden_act"], gated=True),
    # Their norms of short vectors always have this epsilon, whatever config.json says of the others.
    "mla": t.read_part(MLAConfig, hf, MLA_KEYS, norm_eps=1e-6),
    "moe": t.read_part(MoEConfig, hf, MOE_KEYS, shared_mlp_dim=shared, **moe),
  }


def _groups(hf):
  return {"num_groups": hf["n_group"] or 1, "top_groups": hf["topk_group"] or 1}


def _read_v2(hf):
  return _read(hf, **(_groups(hf) if hf["topk_method"] == "group_limited_greedy" else {}))


def _read_v3(hf):
  return _read(hf, **_groups(hf), scoring="sigmoid", correction_bias=True)


def _write(c):
  hf = write_rope(c) | t.write_part(c.mla, MLA_KEYS) | t.write_part(c.moe, MOE_KEYS)
  return hf | {
    "hidden_act": t.activation_name(c.mlp),
    "num_key_value_heads": c.num_heads,
    "n_shared_experts": c.moe.shared_mlp_dim // c.moe.mlp_dim,
    "n_group": c.moe.num_groups,
    "topk_group": c.moe.top_groups,
    "num_nextn_predict_layers": 0,
  }


DEEPSEEK_V2 = t.Family(
  "deepseek_v2",
  "DeepseekV2ForCausalLM",
  {ours: theirs for ours, theirs in llama.LLAMA.keys.items() if ours not in ("num_kv_heads", "head_dim")},
  WEIGHTS + llama.PRE_NORMS,
  defaults=llama.DEFAULTS | {"topk_method": "greedy", "norm_topk_prob": False},
  requires={"moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": False, "mlp_bias": False},
  parts=("moe", "mla"),
  other_names=STACKED,
  read=_read_v2,
  write=lambda c: _write(c) | {"topk_method": "group_limited_greedy" if c.moe.num_groups > 1 else "greedy"},
)
DEEPSEEK_V3 = dataclasses.replace(
  DEEPSEEK_V2,
  name="deepseek_v3",
  architecture="DeepseekV3ForCausalLM",
  defaults=llama.DEFAULTS | {"norm_topk_prob": True},
  requires={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True},
  ignored=("model.layers.{num_layers}.*",),  # the layer that predicts one more token
  read=_read_v3,
  write=lambda c: _write(c) | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
)
