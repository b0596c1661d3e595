"""RoBERTa (arXiv 1907.11692), and models in its code under names of their own: XLM-RoBERTa (1911.02116), CamemBERT
(1911.03894), data2vec's text model (2202.03555), and XLM-RoBERTa XL (2105.00572), whose norms stand before the parts
and at the end."""

import dataclasses

from jaxllm.interop.families import table as t
from jaxllm.interop.families.bert import BERT, weights

LAYER = "roberta.encoder.layer.{layer}"
HEADS = {
  "lm": (
    *t.linear("head/dense", "lm_head.dense"),
    *t.norm("head/norm", "lm_head.layer_norm"),
    t.Weight(("head/weight",), "lm_head.decoder.weight", t.TRANSPOSED),
    t.Weight(("head/bias",), "lm_head.bias"),
  ),
  "sequence": t.linear("head/dense", "classifier.dense") + t.linear("head", "classifier.out_proj"),
  "token": t.linear("head", "classifier"),
  "span": t.linear("head", "qa_outputs"),
  "none": t.linear("head/dense", "roberta.pooler.dense"),
}


def _read(hf):
  pad = hf["pad_token_id"]
  length = hf["max_position_embeddings"] - (pad + 1)
  return {"position_offset": pad + 1, "position_pad_id": pad, "max_seq_len": length}


def _write(c):
  offset = c.position_offset
  return {"pad_token_id": offset - 1, "max_position_embeddings": c.max_seq_len + offset}


ROBERTA = dataclasses.replace(
  BERT,
  name="roberta",
  architecture="RobertaForMaskedLM",
  weights=weights("roberta"),
  by_head=t.encoder_heads(lm="gelu", sequence="tanh", none="tanh"),
  read=_read,
  write=_write,
  prefix="roberta.",
  head="lm_head.decoder.weight",
  architectures=t.classes("Roberta"),
  more_weights=lambda c: HEADS[c.head],
  copies={"lm_head.decoder.bias": "lm_head.bias"},
  ignored=("*position_ids", "*pooler.*"),
)


def _named(name, classes, **more):
  """RoBERTa under another name."""
  names = {"architecture": f"{classes}ForMaskedLM", "architectures": t.classes(classes)}
  return dataclasses.replace(ROBERTA, name=name, **names, **more)


XLM_ROBERTA = _named("xlm-roberta", "XLMRoberta")
CAMEMBERT = _named("camembert", "Camembert")
_DATA2VEC_HEADS = HEADS | {"none": t.linear("head/dense", "data2vec_text.pooler.dense")}
DATA2VEC_TEXT = _named(
  "data2vec-text",
  "Data2VecText",
  weights=weights("data2vec_text"),
  prefix="data2vec_text.",
  more_weights=lambda c: _DATA2VEC_HEADS[c.head],
)
XLM_ROBERTA_XL = _named(
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
