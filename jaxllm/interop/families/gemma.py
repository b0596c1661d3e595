"""Gemma (arXiv 2403.08295): Llama with GeGLU, norms whose weights are around 0, and a factor on the embedding."""

import dataclasses

from jaxllm.interop.families import llama


def _read(hf):
  # "gelu" in the first files meant the approximation that the model was trained with
  mlp = {"mlp": "geglu_tanh"} if hf["hidden_act"] == "gelu" else {}
  return llama.read(hf) | mlp | {"embedding_scale": hf["hidden_size"] ** 0.5}


GEMMA = dataclasses.replace(
  llama.LLAMA,
  name="gemma",
  architecture="GemmaForCausalLM",
  fields={"norm_unit_offset": True},
  requires={"use_bidirectional_attention": None},
  read=_read,
)
