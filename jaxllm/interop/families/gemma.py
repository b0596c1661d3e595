"""Gemma (arXiv 2403.08295), Gemma 2 (2408.00118) and Gemma 3 (2503.19786)."""

import dataclasses

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import read_rope, rope_by_kind, write_rope


def _read(hf, every):
  """`every`: so many layers one is global."""
  types = hf.get("layer_types") or [
    "sliding_attention" if (i + 1) % every else "full_attention" for i in range(hf["num_hidden_layers"])
  ]
  fields = read_rope(hf) | t.read_windows(types, hf["sliding_window"])
  return fields | {
    "mlp": t.mlp_name(hf["hidden_activation"], gated=True),
    "query_scale": hf["query_pre_attn_scalar"] ** -0.5,
    "embedding_scale": hf["hidden_size"] ** 0.5,
  }


def _write(c):
  return write_rope(c) | {
    "hidden_activation": t.activation_name(c.mlp),
    "query_pre_attn_scalar": c.head_dim if c.query_scale is None else round(c.query_scale**-2),
    "sliding_window": c.sliding_window or c.max_seq_len,
    "layer_types": t.types_from_pattern(c),
  }


def _read_gemma(hf):
  # "gelu" in the first files meant the approximation that the model was trained with
  act = "gelu_pytorch_tanh" if hf["hidden_act"] == "gelu" else hf["hidden_act"]
  return llama.read(hf | {"hidden_act": act}) | {"embedding_scale": hf["hidden_size"] ** 0.5}


def _read_gemma3(hf):
  """Local layers have a theta of their own, beside the global ones' or (from 2026) in an object of their own."""
  local = rope_by_kind(hf, "sliding_attention", scaled=False).get("rope_theta", hf["rope_local_base_freq"])
  stretched = {"rope_parameters": rope_by_kind(hf, "full_attention", scaled=True), "rope_scaling": None}
  return _read(hf | stretched, hf["sliding_window_pattern"]) | {"rope_local_theta": float(local)}


GEMMA = dataclasses.replace(
  llama.LLAMA,
  name="gemma",
  architecture="GemmaForCausalLM",
  fields={"norm_unit_offset": True},
  requires={"use_bidirectional_attention": None},
  read=_read_gemma,
)
GEMMA2 = t.Family(
  "gemma2",
  "Gemma2ForCausalLM",
  llama.LLAMA.keys | {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
  (
    *llama.WEIGHTS,
    *t.norm("blocks/attention_norm", f"{llama.LAYER}.input_layernorm"),
    *t.norm("blocks/attention_post_norm", f"{llama.LAYER}.post_attention_layernorm"),
    *t.norm("blocks/mlp_norm", f"{llama.LAYER}.pre_feedforward_layernorm"),
    *t.norm("blocks/mlp_post_norm", f"{llama.LAYER}.post_feedforward_layernorm"),
  ),
  fields={"norm_placement": "sandwich", "norm_unit_offset": True},
  defaults=llama.DEFAULTS,
  requires={"use_bidirectional_attention": None},
  read=lambda hf: _read(hf, 2),
  write=_write,
)
GEMMA3_TEXT = dataclasses.replace(
  GEMMA2,
  name="gemma3_text",
  architecture="Gemma3ForCausalLM",
  keys={
    ours: theirs for ours, theirs in GEMMA2.keys.items() if ours != "attention_softcap"
  },  # which its code passes over
  architectures={"none": "Gemma3TextModel"},
  fields=dict(GEMMA2.fields) | {"qk_norm": "head"},
  defaults=llama.DEFAULTS | {"sliding_window_pattern": 6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
  requires={"use_bidirectional_attention": False},
  read=_read_gemma3,
  write=lambda c: _write(c) | {"rope_local_base_freq": c.rope_local_theta or c.rope_theta},
)
# With the vision tower, which is left aside.
GEMMA3 = dataclasses.replace(
  GEMMA3_TEXT,
  name="gemma3",
  text_config="text_config",
  renamed={"language_model.model.": "model.", "model.language_model.": "model.", "language_model.": ""},
  ignored=("*vision_tower.*", "*multi_modal_projector.*"),
)
