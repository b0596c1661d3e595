"""BERT (arXiv 1810.04805), RoBERTa (1907.11692) and XLM-RoBERTa (1911.02116), with the heads of their classes."""

import dataclasses

from jaxllm.interop.families import table as t

# A Transformer as it was in 2018: learned positions, norms after the sums
POST_NORM = t.BIASED | {
  "position": "learned",
  "norm_placement": "post",
  "embedding_norm": True,
  "final_norm": False,
  "init": "normal",
}


def architectures(name):
  return {
    "sequence": f"{name}ForSequenceClassification",
    "token": f"{name}ForTokenClassification",
    "span": f"{name}ForQuestionAnswering",
    "none": f"{name}Model",
  }


def weights(root):
  layer = root + ".encoder.layer.{layer}"
  return (
    t.embedding("embedding/tokens", f"{root}.embeddings.word_embeddings"),
    t.embedding("embedding/positions", f"{root}.embeddings.position_embeddings"),
    t.embedding("embedding/token_types", f"{root}.embeddings.token_type_embeddings"),
    *t.norm("embedding/norm", f"{root}.embeddings.LayerNorm"),
    *t.linears("blocks/attention", f"{layer}.attention.self", query="query", key="key", value="value"),
    *t.linear("blocks/attention/output", f"{layer}.attention.output.dense"),
    *t.norm("blocks/attention_post_norm", f"{layer}.attention.output.LayerNorm"),
    *t.linear("blocks/mlp/up", f"{layer}.intermediate.dense"),
    *t.linear("blocks/mlp/down", f"{layer}.output.dense"),
    *t.norm("blocks/mlp_post_norm", f"{layer}.output.LayerNorm"),
  )


BERT_HEADS = {
  "lm": (
    *t.linear("head/dense", "cls.predictions.transform.dense"),
    *t.norm("head/norm", "cls.predictions.transform.LayerNorm"),
    t.Weight(("head/weight",), "cls.predictions.decoder.weight", t.TRANSPOSED),
    t.Weight(("head/bias",), "cls.predictions.bias"),
  ),
  "sequence": t.linear("head/dense", "bert.pooler.dense") + t.linear("head", "classifier"),
  "token": t.linear("head", "classifier"),
  "span": t.linear("head", "qa_outputs"),
  "none": t.linear("head/dense", "bert.pooler.dense"),
}
ROBERTA_HEADS = {
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


def read_heads(hf, name, **dense):
  """The fields of a class's head: a norm before a language model's, a bias but for the bare model's."""
  fields = t.read_head(hf, architectures(name))
  head = fields["head"]
  return fields | {"head_dense": dense.get(head), "head_norm": head == "lm", "head_bias": head != "none"}


def _read(hf):
  mlp = t.mlp_name(hf["hidden_act"], gated=False)
  return {"mlp": mlp} | read_heads(hf, "Bert", lm=mlp, sequence="tanh", none="tanh")


def _read_roberta(hf, name):
  offset = hf["pad_token_id"] + 1
  return read_heads(hf, name, lm="gelu", sequence="tanh", none="tanh") | {
    "mlp": t.mlp_name(hf["hidden_act"], gated=False),
    "position_offset": offset,
    "position_pad_id": hf["pad_token_id"],
    "max_seq_len": hf["max_position_embeddings"] - offset,
  }


def _write(c):
  return t.write_labels(c) | {"hidden_act": t.activation_name(c.mlp)}


def _write_roberta(c):
  return _write(c) | {
    "pad_token_id": c.position_offset - 1,
    "max_position_embeddings": c.max_seq_len + c.position_offset,
  }


BERT: t.Family = t.Family(
  "bert",
  "BertForMaskedLM",
  t.KEYS
  | {"num_token_types": "type_vocab_size", "norm_eps": "layer_norm_eps", "tie_embeddings": "tie_word_embeddings"},
  weights("bert"),
  fields=POST_NORM | {"architecture": "encoder"},
  requires={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
  read=_read,
  write=_write,
  prefix="bert.",
  head="cls.predictions.decoder.weight",
  architectures=architectures("Bert"),
  more_weights=lambda c: BERT_HEADS[c.head],
  copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
  own_copies=True,
  ignored=("*position_ids", "*pooler.*", "cls.seq_relationship.*"),  # the last: BertForPreTraining's second objective
)
ROBERTA = dataclasses.replace(
  BERT,
  name="roberta",
  architecture="RobertaForMaskedLM",
  weights=weights("roberta"),
  read=lambda hf: _read_roberta(hf, "Roberta"),
  write=_write_roberta,
  prefix="roberta.",
  head="lm_head.decoder.weight",
  architectures=architectures("Roberta"),
  more_weights=lambda c: ROBERTA_HEADS[c.head],
  copies={"lm_head.decoder.bias": "lm_head.bias"},
  ignored=("*position_ids", "*pooler.*"),
)
XLM_ROBERTA = dataclasses.replace(
  ROBERTA,
  name="xlm-roberta",
  architecture="XLMRobertaForMaskedLM",
  read=lambda hf: _read_roberta(hf, "XLMRoberta"),
  architectures=architectures("XLMRoberta"),
)
