"""GGUF's architectures of decoders with experts, of which one tensor holds all of a layer."""

import logging

import numpy as np

from jaxllm.base.errors import ConfigError
from jaxllm.interop.families.gpt_oss import TURNS
from jaxllm.interop.families.table import transposed
from jaxllm.interop.gguf.decoders import UNBIASED
from jaxllm.interop.gguf.rope import read_rope
from jaxllm.interop.gguf.table import Architecture, Split

log = logging.getLogger("jaxllm")
_MIXTRAL = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_QWEN = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_DEEPSEEK = {
  "expert_count": "n_routed_experts",
  "expert_used_count": "num_experts_per_tok",
  "expert_shared_count": "n_shared_experts",
  "expert_feed_forward_length": "moe_intermediate_size",
  "leading_dense_block_count": "first_k_dense_replace",
  "expert_group_count": "n_group",
  "expert_group_used_count": "topk_group",
  "attention.kv_lora_rank": "kv_lora_rank",
  "attention.q_lora_rank": "q_lora_rank",
}
SOFTMAX, SIGMOID = 1, 2  # "expert_gating_func"


def _read_qwen(m):
  size = m.number("expert_feed_forward_length") or m.positive("feed_forward_length") // m.positive("expert_used_count")
  return {"norm_topk_prob": True, "moe_intermediate_size": size}


def _read_deepseek(m):
  rotated = m.positive("rope.dimension_count")
  m.heeded.update(("attention.head_count_kv", "attention.key_length", "attention.value_length"))  # of what is cached
  # Older files have the lengths of a head as it is, newer ones those of what is cached.
  key, value = (
    m.number(f"attention.{part}_length_mla") or m.positive(f"attention.{part}_length") for part in ("key", "value")
  )
  absent = {"expert_shared_count": 0, "leading_dense_block_count": 0}
  absent |= {"expert_group_count": 1, "expert_group_used_count": 1}
  return {theirs: m.number(name, absent.get(name)) for name, theirs in _DEEPSEEK.items()} | {
    "qk_rope_head_dim": rotated,
    "qk_nope_head_dim": key - rotated,
    "v_head_dim": value,
    "routed_scaling_factor": float(m.number("expert_weights_scale") or 1),
    "norm_topk_prob": m.flag("expert_weights_norm", False),
  }


def _write_deepseek(hf):
  if hf["q_lora_rank"] is None and hf["num_hidden_layers"] not in (26, 27):
    raise ConfigError("GGUF has no DeepSeek model without q_lora_rank, but those of 26 or 27 layers")
  rank, rotated = hf["kv_lora_rank"], hf["qk_rope_head_dim"]
  return {key: hf[theirs] for key, theirs in _DEEPSEEK.items() if hf[theirs] is not None} | {
    # What is cached of all heads is one short vector.
    "attention.head_count_kv": 1,
    "attention.key_length": rank + rotated,
    "attention.value_length": rank,
    "attention.key_length_mla": hf["qk_nope_head_dim"] + rotated,
    "attention.value_length_mla": hf["v_head_dim"],
    "expert_weights_scale": float(hf["routed_scaling_factor"]),
    "expert_weights_norm": hf["norm_topk_prob"],
    "expert_gating_func": SIGMOID if hf["model_type"] == "deepseek_v3" else SOFTMAX,
  }


def _split_latent(c, x):
  keys, values = np.split(x.reshape(c.num_heads, -1, x.shape[-1]), [c.mla.nope_head_dim], axis=1)
  return [transposed(keys), values]


def _join_latent(c, parts):
  keys, values = parts
  return np.concatenate([transposed(keys), values], axis=1).reshape(-1, values.shape[-1])


_LATENT = {
  "query_down": "q_a",
  "query_norm": "q_a_norm",
  "query_up": "q_b",
  "latent": "kv_a_mqa",
  "latent_norm": "kv_a_norm",
  "key": "k_b",
  "value": "v_b",
}
_DEEPSEEK_SETTINGS = {
  "read": _read_deepseek,
  "write": _write_deepseek,
  "stems": lambda c: {f"blocks/attention/{ours}": f"blk.{{}}.attn_{theirs}" for ours, theirs in _LATENT.items()},
  "splits": {"blocks/attention/key/weight": Split(_split_latent, _join_latent)},
  "joined": {"blocks/attention/key/weight": "blk.{}.attn_kv_b.weight"},
  "latent": True,
}


def _read_gpt_oss(m):
  rope = read_rope(m, m.positive("attention.key_length"))
  scaling = rope.pop("rope_scaling", None)
  parameters = scaling | {"truncate": False} if scaling else {"rope_type": "default"}
  return {
    "rope_parameters": parameters | rope,
    "rope_scaling": None,
    "layer_types": m.pattern(2),
    "sliding_window": m.positive("attention.sliding_window"),
  }


def _write_gpt_oss(hf):
  if hf["layer_types"] != ["full_attention" if i % 2 else "sliding_attention" for i in range(len(hf["layer_types"]))]:
    raise ConfigError("GGUF has no gpt-oss model but with a window in every other layer, beginning with the first")
  if hf["rope_parameters"]["rope_type"] == "yarn":
    log.warning("GGUF: llama.cpp rounds the dimensions between which YaRN blends; logits differ a little")
  length = hf["intermediate_size"]
  return {"attention.sliding_window": hf["sliding_window"], "expert_feed_forward_length": length}


MIXTURES = (
  Architecture("llama", "mixtral", optional=_MIXTRAL, interleaved=True, windowless=True, factors=True),
  Architecture(
    "qwen3moe",
    "qwen3_moe",
    optional=_QWEN,
    only=UNBIASED,
    read=_read_qwen,
    write=lambda hf: {"expert_feed_forward_length": hf["moe_intermediate_size"]},
  ),
  # Of its groups of experts llama.cpp takes those with the best two, as V3, and not those with the best one.
  Architecture("deepseek2", "deepseek_v2", only={"topk_method": "greedy"}, **_DEEPSEEK_SETTINGS),
  Architecture("deepseek2", "deepseek_v3", **_DEEPSEEK_SETTINGS),
  Architecture(
    "gpt-oss",
    "gpt_oss",
    optional=_MIXTRAL,
    only={"tie_word_embeddings": False, "attention_bias": True},
    read=_read_gpt_oss,
    write=_write_gpt_oss,
    stems=lambda c: {"blocks/mlp_norm": "blk.{}.post_attention_norm"},
    transposed="blocks/moe/down/weight$",
    splits={
      "blocks/moe/gate/weight": Split(
        lambda c, x: [transposed(part) for part in TURNS.read(c, x, [])],
        lambda c, parts: TURNS.write(c, [transposed(part) for part in parts]),
      ),
      "blocks/moe/gate/bias": Split(lambda c, x: TURNS.read(c, x, []), TURNS.write),
    },
  ),
)
