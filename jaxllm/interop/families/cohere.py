"""Command R (Cohere, 2024): a parallel residual after one LayerNorm without bias, heads rotated in neighbouring pairs,
a factor on the logits; Command R7B and A (`cohere2`, arXiv 2504.00698) rotate in their windowed layers only."""

import dataclasses

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import interleaved, read_rope, write_rope


def _read(hf):
  return read_rope(hf) | {"qk_norm": "heads" if hf["use_qk_norm"] else "none"}


def _write(c):
  # Its default end token is of the published vocabulary, and may be outside ours.
  return write_rope(c) | {"use_qk_norm": c.qk_norm == "heads"}


def _read_cohere2(hf):
  every = hf["sliding_window_pattern"]
  types = t.layer_types(hf, lambda i: (i + 1) % every)
  kinds = ["nope" if kind == "global" else kind for kind in t.pattern_from_types(types)]
  window = {"sliding_window": hf["sliding_window"]} if "local" in kinds else {}
  return read_rope(hf) | window | {"layer_pattern": tuple(kinds)}


def _write_cohere2(c):
  windows = {"layer_types": t.types_from_pattern(c), "sliding_window": c.sliding_window or c.max_seq_len}
  return write_rope(c) | windows


COHERE = t.Family(
  "cohere",
  "CohereForCausalLM",
  llama.without("norm_eps", "head_dim") | t.BIASES | {"norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"},
  (*interleaved(llama.FRAME), *llama.MLP, *t.norm("blocks/attention_norm", f"{llama.LAYER}.input_layernorm")),
  fields={"norm": "layernorm", "norm_bias": False, "parallel_residual": True, "shared_norm": True},
  read=_read,
  write=_write,
)
COHERE2 = dataclasses.replace(
  COHERE,
  name="cohere2",
  architecture="Cohere2ForCausalLM",
  defaults={"sliding_window_pattern": 4},
  read=_read_cohere2,
  write=_write_cohere2,
)
