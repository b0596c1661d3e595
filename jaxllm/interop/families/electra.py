"""ELECTRA (arXiv 2003.10555): BERT whose embedding may be narrower; a generator, and a discriminator that says of each
token whether it was replaced: one label, read as classes of tokens are, so that its logits are [B, T, 1] (in
transformers [B, T])."""

import dataclasses

from jaxllm.interop.families import table as t
from jaxllm.interop.families.bert import BERT, weights

DISCRIMINATOR = "ElectraForPreTraining"


def _heads(c):
  if c.head == "token" and c.head_dense:
    names = "discriminator_predictions.dense", "discriminator_predictions.dense_prediction"
    return t.linear("head/dense", names[0]) + t.linear("head", names[1])
  return {
    "lm": (
      *t.linear("head/dense", "generator_predictions.dense"),
      *t.norm("head/norm", "generator_predictions.LayerNorm"),
      *t.linear("head", "generator_lm_head"),
    ),
    "sequence": t.linear("head/dense", "classifier.dense") + t.linear("head", "classifier.out_proj"),
    "token": t.linear("head", "classifier"),
    "span": t.linear("head", "qa_outputs"),
    "none": (),
  }[c.head]


def _read(hf):
  width = hf["embedding_size"]
  fields = {"embedding_dim": 0 if width == hf["hidden_size"] else width}
  if t.class_of(hf) == DISCRIMINATOR:
    dense = t.mlp_name(hf["hidden_act"], gated=False)
    fields |= {"head": "token", "num_labels": 1, "head_dense": dense, "head_norm": False, "head_bias": True}
  return fields


def _write(c):
  discriminates = c.head == "token" and c.head_dense
  return {"embedding_size": c.token_dim} | ({"architectures": [DISCRIMINATOR]} if discriminates else {})


ELECTRA = dataclasses.replace(
  BERT,
  name="electra",
  architecture="ElectraForMaskedLM",
  weights=(*weights("electra"), *t.linear("embedding/projection", "electra.embeddings_project")),
  by_head=t.encoder_heads(lm="gelu", sequence="gelu"),
  read=_read,
  write=_write,
  prefix="electra.",
  head="generator_lm_head.weight",
  architectures=t.classes("Electra"),
  others=(DISCRIMINATOR,),
  more_weights=_heads,
  copies={},
  ignored=("*position_ids",),
)
