"""BERT (arXiv 1810.04805), with the heads of its classes, and what encoders share that came after it."""

from jaxllm.interop.families import table as t

# A Transformer as it was in 2018: learned positions, norms after the sums
POST_NORM = t.BIASED | {
  "position": "learned",
  "norm_placement": "post",
  "embedding_norm": True,
  "final_norm": False,
  "init": "normal",
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


HEADS = {
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
BERT: t.Family = t.Family(
  "bert",
  "BertForMaskedLM",
  t.KEYS | {"num_token_types": "type_vocab_size", "norm_eps": "layer_norm_eps"},
  weights("bert"),
  gated=False,
  fields=POST_NORM | {"architecture": "encoder"},
  by_head=t.encoder_heads(lm="hidden_act", sequence="tanh", none="tanh"),
  requires={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
  prefix="bert.",
  head="cls.predictions.decoder.weight",
  architectures=t.classes("Bert"),
  more_weights=lambda c: HEADS[c.head],
  copies={"cls.predictions.decoder.bias": "cls.predictions.bias"},
  own_copies=True,
  ignored=("*position_ids", "*pooler.*", "cls.seq_relationship.*"),  # the last: BertForPreTraining's second objective
)
