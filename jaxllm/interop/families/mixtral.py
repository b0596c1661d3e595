"""Mixtral (arXiv 2401.04088): Mistral with experts."""

import dataclasses

from jaxllm.interop.families import llama, moe
from jaxllm.interop.families import table as t
from jaxllm.interop.families.mistral import MISTRAL
from jaxllm.models.config import MoEConfig

KEYS = {"num_experts": "num_local_experts", "top_k": "num_experts_per_tok"}
KEYS |= {"load_balance_weight": "router_aux_loss_coef"}

MIXTRAL = dataclasses.replace(
  MISTRAL,
  name="mixtral",
  architecture="MixtralForCausalLM",
  weights=(
    *MISTRAL.weights,
    t.Weight(moe.ROUTER.ours, f"{llama.LAYER}.block_sparse_moe.gate.weight", t.TRANSPOSED),
    *moe.separate("block_sparse_moe.experts", "w1", "w3", "w2"),
  ),
  other_names=(moe.ROUTER, *moe.STACKED),
  parts=("moe",),
  read=lambda hf: MISTRAL.read(hf) | {"moe": t.read_part(MoEConfig, hf, KEYS)},
  write=lambda c: MISTRAL.write(c) | t.write_part(c.moe, KEYS),
)
