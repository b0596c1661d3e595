"""ModernBERT (arXiv 2412.13663): RoPE, GeGLU, and windows in two of three layers, in an encoder."""

from jaxllm.base.errors import ConfigError, shown
from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import rope_by_kind

LAYER = "model.layers.{layer}"
ARCHITECTURES = {
  "sequence": "ModernBertForSequenceClassification",
  "token": "ModernBertForTokenClassification",
  "span": "ModernBertForQuestionAnswering",
  "none": "ModernBertModel",
}
POOLING = {"cls": "first", "mean": "mean"}
TRANSFORM = (*t.linear("head/dense", "head.dense"), *t.norm("head/norm", "head.norm"))


def _read(hf):
  fields = t.read_head(hf, ARCHITECTURES)
  head = fields["head"]
  if hf["classifier_pooling"] not in POOLING:
    raise ConfigError(f"config.json has classifier_pooling {shown(hf['classifier_pooling'])}; it can be cls or mean")
  every = hf["global_attn_every_n_layers"]
  types = ["sliding_attention" if i % every else "full_attention" for i in range(hf["num_hidden_layers"])]
  windows = t.read_windows(hf.get("layer_types") or types, hf["local_attention"] // 2 + 1)
  scopes = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
  rope = {kind: rope_by_kind(hf, kind, scaled=True) for kind in scopes}
  theta = {kind: rope[kind].get("rope_theta", hf[key]) for kind, key in scopes.items()}
  if any(one.get("rope_type", one.get("type", "default")) != "default" for one in rope.values()):
    raise ConfigError("config.json has RoPE scaling, which a modernbert here cannot have")
  if windows:
    fields |= windows | {"rope_local_theta": theta["sliding_attention"]}
  return fields | {
    "rope_theta": theta["full_attention"],
    "mlp": t.mlp_name(hf["hidden_activation"], gated=True),
    "head_dense": None if head == "none" else t.mlp_name(hf["classifier_activation"], gated=False),
    "head_dense_bias": hf["classifier_bias"],
    "head_norm": head != "none",
    "head_bias": hf["decoder_bias"] if head == "lm" else head != "none",
    "pooling": POOLING[hf["classifier_pooling"]],
  }


def _write(c):
  return t.write_labels(c) | {
    "layer_types": t.types_from_pattern(c),
    "local_attention": 128 if c.sliding_window is None else 2 * (c.sliding_window - 1),
    "global_rope_theta": c.rope_theta,
    "local_rope_theta": c.rope_local_theta or c.rope_theta,
    "hidden_activation": t.activation_name(c.mlp),
    "classifier_activation": t.activation_name(c.head_dense or "gelu"),
    "classifier_bias": c.has_dense_bias,
    "classifier_pooling": {"first": "cls", "mean": "mean"}[c.pooling],
    "decoder_bias": c.head_bias if c.head == "lm" else True,
  }


MODERNBERT = t.Family(
  "modernbert",
  "ModernBertForMaskedLM",
  t.KEYS
  | t.BIASES
  | {"norm_eps": "norm_eps", "norm_bias": "norm_bias", "mlp_bias": "mlp_bias", "tie_embeddings": "tie_word_embeddings"},
  (
    t.embedding("embedding/tokens", "model.embeddings.tok_embeddings"),
    *t.norm("embedding/norm", "model.embeddings.norm"),
    t.Weight(("blocks/attention_norm/scale",), f"{LAYER}.attn_norm.weight", first_layer=1),
    t.Weight(("blocks/attention_norm/bias",), f"{LAYER}.attn_norm.bias", first_layer=1),
    *t.linear(t.QKV, f"{LAYER}.attn.Wqkv", t.ROWS),
    *t.linear("blocks/attention/output", f"{LAYER}.attn.Wo"),
    *t.norm("blocks/mlp_norm", f"{LAYER}.mlp_norm"),
    *t.linear(("blocks/mlp/gate", "blocks/mlp/up"), f"{LAYER}.mlp.Wi", t.ROWS),
    *t.linear("blocks/mlp/down", f"{LAYER}.mlp.Wo"),
    *t.norm("final_norm", "model.final_norm"),
  ),
  fields={
    "architecture": "encoder",
    "norm": "layernorm",
    "embedding_norm": True,
    "first_norm": False,
    "init": "gpt2",
  },
  defaults={"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0},
  read=_read,
  write=_write,
  head="decoder.weight",
  architectures=ARCHITECTURES,
  more_weights=lambda c: TRANSFORM + t.linear("head", "decoder" if c.head == "lm" else "classifier"),
)
