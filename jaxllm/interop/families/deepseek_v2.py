"""DeepSeek-V2 (arXiv 2405.04434): latent attention, and experts with some that all tokens share."""

from jaxllm.interop.families import latent_attention, llama, moe
from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import read_rope, write_rope
from jaxllm.models.config import MoEConfig

SHARED = f"{llama.LAYER}.mlp.shared_experts"
KEYS = {
  "num_experts": "n_routed_experts",
  "top_k": "num_experts_per_tok",
  "mlp_dim": "moe_intermediate_size",
  "first_dense_layers": "first_k_dense_replace",
  "scale": "routed_scaling_factor",
  "normalize": "norm_topk_prob",
}


def read(hf, grouped, **experts):
  """`grouped`: experts are chosen in groups. `experts`: further fields of a `MoEConfig`."""
  shared = hf["n_shared_experts"] * hf["moe_intermediate_size"]
  groups = {"num_groups": hf["n_group"] or 1, "top_groups": hf["topk_group"] or 1} if grouped else {}
  moe_config = t.read_part(MoEConfig, hf, KEYS, shared_mlp_dim=shared, **groups, **experts)
  return read_rope(hf) | {"mla": latent_attention.read(hf), "moe": moe_config}


def write(c):
  hf = write_rope(c) | t.write_part(c.mla, latent_attention.KEYS) | t.write_part(c.moe, KEYS)
  return hf | {
    "num_key_value_heads": c.num_heads,
    "n_shared_experts": c.moe.shared_mlp_dim // c.moe.mlp_dim,
    "n_group": c.moe.num_groups,
    "topk_group": c.moe.top_groups,
    "num_nextn_predict_layers": 0,
    "topk_method": "group_limited_greedy" if c.moe.num_groups > 1 else "greedy",
  }


DEEPSEEK_V2 = t.Family(
  "deepseek_v2",
  "DeepseekV2ForCausalLM",
  llama.without("num_kv_heads", "head_dim") | t.BIASES,
  (
    *(w for w in llama.LLAMA.weights if not w.ours[0].startswith("blocks/attention/")),
    *latent_attention.WEIGHTS,
    moe.ROUTER,
    t.Weight(("blocks/moe/correction_bias",), f"{llama.LAYER}.mlp.gate.e_score_correction_bias"),
    *moe.SEPARATE,
    *t.linears("blocks/moe/shared", SHARED, gate="gate_proj", up="up_proj", down="down_proj"),
  ),
  defaults=llama.DEFAULTS | {"topk_method": "greedy", "norm_topk_prob": False},
  requires={"moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": False, "mlp_bias": False},
  parts=("moe", "mla"),
  other_names=moe.STACKED,
  read=lambda hf: read(hf, grouped=hf["topk_method"] == "group_limited_greedy"),
  write=write,
)
