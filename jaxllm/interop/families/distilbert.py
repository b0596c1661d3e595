"""DistilBERT (arXiv 1910.01108): BERT without kinds of segments and without a pooler."""

from jaxllm.interop.families import table as t
from jaxllm.interop.families.bert import POST_NORM

LAYER = "distilbert.transformer.layer.{layer}"
HEADS = {
  "lm": (
    *t.linear("head/dense", "vocab_transform"),
    *t.norm("head/norm", "vocab_layer_norm"),
    *t.linear("head", "vocab_projector"),
  ),
  "sequence": t.linear("head/dense", "pre_classifier") + t.linear("head", "classifier"),
  "token": t.linear("head", "classifier"),
  "span": t.linear("head", "qa_outputs"),
  "none": (),
}

DISTILBERT = t.Family(
  "distilbert",
  "DistilBertForMaskedLM",
  t.KEYS | {"embed_dim": "dim", "num_layers": "n_layers", "num_heads": "n_heads", "mlp_dim": "hidden_dim"},
  (
    t.embedding("embedding/tokens", "distilbert.embeddings.word_embeddings"),
    # sinusoids too
    t.embedding("embedding/positions", "distilbert.embeddings.position_embeddings"),
    *t.norm("embedding/norm", "distilbert.embeddings.LayerNorm"),
    *t.linears("blocks/attention", f"{LAYER}.attention", query="q_lin", key="k_lin", value="v_lin", output="out_lin"),
    *t.norm("blocks/attention_post_norm", f"{LAYER}.sa_layer_norm"),
    *t.linears("blocks/mlp", f"{LAYER}.ffn", up="lin1", down="lin2"),
    *t.norm("blocks/mlp_post_norm", f"{LAYER}.output_layer_norm"),
  ),
  activation="activation",
  gated=False,
  fields=POST_NORM | {"architecture": "encoder", "norm_eps": 1e-12},
  by_head=t.encoder_heads(lm="activation", sequence="relu"),
  prefix="distilbert.",
  head="vocab_projector.weight",
  architectures=t.classes("DistilBert"),
  more_weights=lambda c: HEADS[c.head],
)
