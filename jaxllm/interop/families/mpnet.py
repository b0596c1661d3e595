"""MPNet (arXiv 2004.09297): RoBERTa with a relative bias beside its positions, shared by all layers."""

import dataclasses

from jaxllm.interop.families import table as t
from jaxllm.interop.families.bert import POST_NORM
from jaxllm.interop.families.roberta import HEADS, ROBERTA

LAYER = "mpnet.encoder.layer.{layer}"
# The code takes the token 1 for padding, whatever the config says.
OFFSET = 2

MPNET = dataclasses.replace(
  ROBERTA,
  name="mpnet",
  architecture="MPNetForMaskedLM",
  keys={ours: theirs for ours, theirs in ROBERTA.keys.items() if ours != "num_token_types"},
  weights=(
    t.embedding("embedding/tokens", "mpnet.embeddings.word_embeddings"),
    t.embedding("embedding/positions", "mpnet.embeddings.position_embeddings"),
    *t.norm("embedding/norm", "mpnet.embeddings.LayerNorm"),
    t.embedding("relative_bias", "mpnet.encoder.relative_attention_bias"),
    *t.linears("blocks/attention", f"{LAYER}.attention.attn", query="q", key="k", value="v", output="o"),
    *t.norm("blocks/attention_post_norm", f"{LAYER}.attention.LayerNorm"),
    *t.linear("blocks/mlp/up", f"{LAYER}.intermediate.dense"),
    *t.linear("blocks/mlp/down", f"{LAYER}.output.dense"),
    *t.norm("blocks/mlp_post_norm", f"{LAYER}.output.LayerNorm"),
  ),
  fields=POST_NORM
  | {"architecture": "encoder", "relative_bias": "learned", "position_offset": OFFSET, "position_pad_id": OFFSET - 1},
  requires={"relative_attention_num_buckets": 32},  # the code has no other number
  read=lambda hf: {"max_seq_len": hf["max_position_embeddings"] - OFFSET},
  write=lambda c: {"max_position_embeddings": c.max_seq_len + OFFSET},
  prefix="mpnet.",
  architectures=t.classes("MPNet"),
  more_weights=lambda c: t.linear("head/dense", "mpnet.pooler.dense") if c.head == "none" else HEADS[c.head],
)
