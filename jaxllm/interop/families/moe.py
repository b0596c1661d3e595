"""Decoders with experts: Mixtral (arXiv 2401.04088) and Qwen3-MoE (2505.09388)."""

import dataclasses

from jaxllm.base.errors import ConfigError, shown
from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.models.config import MoEConfig

PARTS = ("gate", "up", "down")
MATRICES = tuple(f"blocks/moe/{part}/weight" for part in PARTS)
# Published checkpoints have a tensor for each expert's matrix; transformers holds one for all experts of a layer.
SEPARATE = tuple(
  t.Weight((path,), f"{llama.LAYER}.mlp.experts.{{expert}}.{part}_proj.weight", t.TRANSPOSED)
  for part, path in zip(PARTS, MATRICES)
)
STACKED = (
  t.Weight(MATRICES[:2], f"{llama.LAYER}.mlp.experts.gate_up_proj", t.ROWS),
  t.Weight(MATRICES[2:], f"{llama.LAYER}.mlp.experts.down_proj", t.TRANSPOSED),
)
ROUTER = t.Weight(("blocks/moe/router/weight",), f"{llama.LAYER}.mlp.gate.weight", t.TRANSPOSED)


MIXTRAL_KEYS = {
  "num_experts": "num_local_experts",
  "top_k": "num_experts_per_tok",
  "load_balance_weight": "router_aux_loss_coef",
}
QWEN_KEYS = {
  "num_experts": "num_experts",
  "top_k": "num_experts_per_tok",
  "mlp_dim": "moe_intermediate_size",
  "normalize": "norm_topk_prob",
  "every": "decoder_sparse_step",
  "load_balance_weight": "router_aux_loss_coef",
}


def _read_mixtral(hf):
  return llama.read_mistral(hf) | {"moe": t.read_part(MoEConfig, hf, MIXTRAL_KEYS)}


def _write_mixtral(c):
  return llama.write_mistral(c) | t.write_part(c.moe, MIXTRAL_KEYS)


def _read_qwen(hf):
  dense = list(hf["mlp_only_layers"] or [])
  if dense != list(range(len(dense))):
    raise ConfigError(
      f"config.json has mlp_only_layers = {shown(dense)}; only the first layers can be without experts here"
    )
  moe = t.read_part(MoEConfig, hf, QWEN_KEYS, first_dense_layers=len(dense))
  window = hf["sliding_window"] if hf["use_sliding_window"] else None  # of all layers
  return llama.read(hf) | {"sliding_window": window, "moe": moe}


def _write_qwen(c):
  first = {"mlp_only_layers": list(range(c.moe.first_dense_layers))}
  window = {"use_sliding_window": c.sliding_window is not None, "sliding_window": c.sliding_window}
  return llama.write(c) | t.write_part(c.moe, QWEN_KEYS) | first | window


MIXTRAL = dataclasses.replace(
  llama.MISTRAL,
  name="mixtral",
  architecture="MixtralForCausalLM",
  weights=(
    *llama.MISTRAL.weights,
    t.Weight(ROUTER.ours, f"{llama.LAYER}.block_sparse_moe.gate.weight", t.TRANSPOSED),
    *(
      t.Weight((path,), f"{llama.LAYER}.block_sparse_moe.experts.{{expert}}.{name}.weight", t.TRANSPOSED)
      for path, name in zip(MATRICES, ("w1", "w3", "w2"))
    ),
  ),
  other_names=(ROUTER, *STACKED),
  parts=("moe",),
  read=_read_mixtral,
  write=_write_mixtral,
)
QWEN3_MOE = dataclasses.replace(
  llama.QWEN3,
  name="qwen3_moe",
  architecture="Qwen3MoeForCausalLM",
  weights=(*llama.QWEN3.weights, ROUTER, *SEPARATE),
  other_names=STACKED,
  parts=("moe",),
  read=_read_qwen,
  write=_write_qwen,
)
