"""Decoders with experts: Mixtral (arXiv 2401.04088) and Qwen3-MoE (2505.09388)."""

import dataclasses

from jaxllm.base.errors import ConfigError
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


def _read_mixtral(hf):
  moe = MoEConfig(
    num_experts=hf["num_local_experts"],
    top_k=hf["num_experts_per_tok"],
    load_balance_weight=hf["router_aux_loss_coef"],
  )
  return llama.read_mistral(hf) | {"moe": moe}


def _write_mixtral(c):
  return llama.write_mistral(c) | {
    "num_local_experts": c.moe.num_experts,
    "num_experts_per_tok": c.moe.top_k,
    "router_aux_loss_coef": c.moe.load_balance_weight,
  }


def _read_qwen(hf):
  dense = list(hf["mlp_only_layers"] or [])
  if dense != list(range(len(dense))):
    raise ConfigError(f"config.json has mlp_only_layers = {dense}; only the first layers can be without experts here")
  moe = MoEConfig(
    num_experts=hf.get("num_local_experts") or hf["num_experts"],
    top_k=hf["num_experts_per_tok"],
    mlp_dim=hf["moe_intermediate_size"],
    normalize=hf["norm_topk_prob"],
    first_dense_layers=len(dense),
    every=hf["decoder_sparse_step"],
    load_balance_weight=hf["router_aux_loss_coef"],
  )
  return llama.QWEN3.read(hf) | {"moe": moe}


def _write_qwen(c):
  return llama.QWEN3.write(c) | {
    "num_experts": c.moe.num_experts,
    "num_experts_per_tok": c.moe.top_k,
    "moe_intermediate_size": c.moe.mlp_dim,
    "norm_topk_prob": c.moe.normalize,
    "mlp_only_layers": list(range(c.moe.first_dense_layers)),
    "decoder_sparse_step": c.moe.every,
    "router_aux_loss_coef": c.moe.load_balance_weight,
  }


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
  defaults=llama.DEFAULTS | {"rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.001},
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
  defaults=llama.DEFAULTS
  | {"norm_topk_prob": False, "mlp_only_layers": None, "decoder_sparse_step": 1, "router_aux_loss_coef": 0.001},
  parts=("moe",),
  read=_read_qwen,
  write=_write_qwen,
)
