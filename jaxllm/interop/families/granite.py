"""Granite 3 (IBM, 2024): Llama with a factor on the embedding, the scores, what is added to the stream, and the logits
(as maximal update parametrization has them, arXiv 2203.03466)."""

import dataclasses

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t


def _read(hf):
  factor = lambda value: None if value == 1 else float(value)  # noqa: E731
  return llama.read(hf) | {
    "embedding_scale": factor(hf["embedding_multiplier"]),
    "residual_scale": factor(hf["residual_multiplier"]),
    "logit_scale": factor(1 / hf["logits_scaling"]),
    "query_scale": float(hf["attention_multiplier"]),
  }


def _write(c):
  one = lambda value: 1.0 if value is None else value  # noqa: E731
  return llama.write(c) | {
    "embedding_multiplier": one(c.embedding_scale),
    "residual_multiplier": one(c.residual_scale),
    "logits_scaling": round(1 / one(c.logit_scale), 12),
    "attention_multiplier": c.head_dim**-0.5 if c.query_scale is None else c.query_scale,
  }


GRANITE = dataclasses.replace(
  llama.LLAMA,
  name="granite",
  architecture="GraniteForCausalLM",
  keys=llama.without("head_dim") | t.BIASES,
  read=_read,
  write=_write,
)
