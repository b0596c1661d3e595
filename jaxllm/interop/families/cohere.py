"""Command R (Cohere, 2024): a parallel residual after one LayerNorm without bias, heads rotated in neighbouring pairs,
a factor on the logits; Command R7B and A (`cohere2`, arXiv 2504.00698) rotate in their windowed layers only."""

import dataclasses

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import interleaved, read_rope, write_rope


def _read(hf):
  heads = {"qk_norm": "heads" if hf["use_qk_norm"] else "none"}
  return read_rope(hf) | heads | {"mlp": t.mlp_name(hf["hidden_act"], gated=True)}


def _write(c):
  # Its default end token is of the published vocabulary, and may be outside ours.
  return write_rope(c) | {"hidden_act": t.activation_name(c.mlp), "use_qk_norm": c.qk_norm == "heads"}


def _read_cohere2(hf):
  every, layers = hf["sliding_window_pattern"], range(hf["num_hidden_layers"])
  types = hf.get("layer_types") or ["sliding_attention" if (i + 1) % every else "full_attention" for i in layers]
  kinds = ["nope" if kind == "global" else kind for kind in t.pattern_from_types(types)]
  fields = {"mlp": t.mlp_name(hf["hidden_act"], gated=True), "layer_pattern": tuple(kinds)}
  return read_rope(hf) | fields | ({"sliding_window": hf["sliding_window"]} if "local" in kinds else {})


def _write_cohere2(c):
  kinds = {"hidden_act": t.activation_name(c.mlp), "layer_types": t.types_from_pattern(c)}
  return write_rope(c) | kinds | {"sliding_window": c.sliding_window or c.max_seq_len}


COHERE = t.Family(
  "cohere",
  "CohereForCausalLM",
  {ours: theirs for ours, theirs in llama.KEYS.items() if ours not in ("norm_eps", "head_dim")}
  | t.BIASES
  | {"norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"},
  (*interleaved(llama.WEIGHTS), *t.norm("blocks/attention_norm", f"{llama.LAYER}.input_layernorm")),
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
