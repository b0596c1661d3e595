"""Models in RoBERTa's code under names of their own: CamemBERT (arXiv 1911.03894), data2vec's text model (2202.03555),
and XLM-RoBERTa XL (2105.00572), whose norms stand before the parts and at the end."""

import dataclasses

from jaxllm.interop.families import table as t
from jaxllm.interop.families.bert import ROBERTA, ROBERTA_HEADS, architectures, read_heads, weights

LAYER = "roberta.encoder.layer.{layer}"


def _named(family, name, classes, **more):
  """The family under another name."""
  return dataclasses.replace(
    family,
    name=name,
    architecture=f"{classes}ForMaskedLM",
    read=lambda hf: ROBERTA.read(hf) | read_heads(hf, classes, lm="gelu", sequence="tanh", none="tanh"),
    architectures=architectures(classes),
    **more,
  )


CAMEMBERT = _named(ROBERTA, "camembert", "Camembert")
_DATA2VEC_HEADS = ROBERTA_HEADS | {"none": t.linear("head/dense", "data2vec_text.pooler.dense")}
DATA2VEC_TEXT = _named(
  ROBERTA,
  "data2vec-text",
  "Data2VecText",
  weights=weights("data2vec_text"),
  prefix="data2vec_text.",
  more_weights=lambda c: _DATA2VEC_HEADS[c.head],
)
XLM_ROBERTA_XL = _named(
  ROBERTA,
  "xlm-roberta-xl",
  "XLMRobertaXL",
  weights=(
    *(w for w in weights("roberta") if "norm" not in w.ours[0]),
    *t.norm("blocks/attention_norm", f"{LAYER}.attention.self_attn_layer_norm"),
    *t.norm("blocks/mlp_norm", f"{LAYER}.LayerNorm"),
    *t.norm("final_norm", "roberta.encoder.LayerNorm"),
  ),
  fields=dict(ROBERTA.fields) | {"norm_placement": "pre", "embedding_norm": False, "final_norm": True},
)
