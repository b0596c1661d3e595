"""gpt-oss (arXiv 2508.10925): attention sinks, experts with biases and clamped activations, YaRN without rounding."""

import dataclasses

import numpy as np

from jaxllm.base.errors import ConfigError
from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.interop.families.mixtral import KEYS
from jaxllm.interop.families.rope import read_rope, rope_settings, write_rope
from jaxllm.models.config import MoEConfig
from jaxllm.models.mlp import CLAMP, GAIN

EXPERTS = f"{llama.LAYER}.mlp.experts"
# What a config.json without `rope_parameters` means
ROPE = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
ROPE |= {"original_max_position_embeddings": 4096}
# gate and up take turns in the last axis, and nothing lies turned
TURNS = t.Transform(
  lambda c, x, shapes: [x[..., ::2], x[..., 1::2]],
  lambda c, weights: np.stack(weights, axis=-1).reshape(*weights[0].shape[:-1], -1),
)


def _experts(ours, theirs):
  both = tuple(f"blocks/moe/{part}/{ours}" for part in ("gate", "up"))
  down = t.Weight((f"blocks/moe/down/{ours}",), f"{EXPERTS}.down_proj{theirs}")
  return t.Weight(both, f"{EXPERTS}.gate_up_proj{theirs}", TURNS), down


def _read(hf):
  if (hf["swiglu_limit"], hf["swiglu_alpha"]) != (CLAMP, GAIN):
    raise ConfigError(f"config.json has swiglu_limit and swiglu_alpha other than {CLAMP} and {GAIN}")
  rope = rope_settings(hf) or ROPE
  types = t.layer_types(hf, lambda i: i % 2 == 0)
  return (
    read_rope(hf | {"rope_parameters": rope, "rope_scaling": None})
    | t.read_windows(types, hf["sliding_window"])
    | {"moe": t.read_part(MoEConfig, hf, KEYS, bias=True)}
  )


def _write(c):
  rope = {"rope_type": "default"} | write_rope(c).get("rope_scaling", {})
  return t.write_part(c.moe, KEYS) | {
    "rope_parameters": rope | {"rope_theta": c.rope_theta},
    "layer_types": t.types_from_pattern(c),
    "sliding_window": c.sliding_window or c.max_seq_len,
  }


GPT_OSS = dataclasses.replace(
  llama.LLAMA,
  name="gpt_oss",
  architecture="GptOssForCausalLM",
  weights=(
    *llama.FRAME,
    *llama.PRE_NORMS,
    t.Weight(("blocks/attention/sinks",), f"{llama.LAYER}.self_attn.sinks"),
    *t.linear("blocks/moe/router", f"{llama.LAYER}.mlp.router"),
    *_experts("weight", ""),
    *_experts("bias", "_bias"),
  ),
  activation=None,
  fields={"attention_sinks": True, "mlp": "swiglu_clamped"},
  requires={"hidden_act": "silu"},
  parts=("moe",),
  read=_read,
  write=_write,
)
