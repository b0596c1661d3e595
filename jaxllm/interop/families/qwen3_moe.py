"""Qwen3-MoE (arXiv 2505.09388): Qwen 3 with experts, in all layers or some."""

import dataclasses

from jaxllm.base.errors import ConfigError, shown
from jaxllm.interop.families import llama, moe
from jaxllm.interop.families import table as t
from jaxllm.interop.families.qwen import QWEN3
from jaxllm.models.config import MoEConfig

KEYS = {
  "num_experts": "num_experts",
  "top_k": "num_experts_per_tok",
  "mlp_dim": "moe_intermediate_size",
  "normalize": "norm_topk_prob",
  "every": "decoder_sparse_step",
  "load_balance_weight": "router_aux_loss_coef",
}


def _read(hf):
  dense = list(hf["mlp_only_layers"] or [])
  if dense != list(range(len(dense))):
    raise ConfigError(
      f"config.json has mlp_only_layers = {shown(dense)}; only the first layers can be without experts here"
    )
  experts = t.read_part(MoEConfig, hf, KEYS, first_dense_layers=len(dense))
  window = hf["sliding_window"] if hf["use_sliding_window"] else None  # of all layers
  return llama.read(hf) | {"sliding_window": window, "moe": experts}


def _write(c):
  first = {"mlp_only_layers": list(range(c.moe.first_dense_layers))}
  window = {"use_sliding_window": c.sliding_window is not None, "sliding_window": c.sliding_window}
  return llama.write(c) | t.write_part(c.moe, KEYS) | first | window


QWEN3_MOE = dataclasses.replace(
  QWEN3,
  name="qwen3_moe",
  architecture="Qwen3MoeForCausalLM",
  weights=(*QWEN3.weights, moe.ROUTER, *moe.SEPARATE),
  other_names=moe.STACKED,
  parts=("moe",),
  read=_read,
  write=_write,
)
