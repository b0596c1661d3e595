"""ModernBERT (arXiv 2412.13663): RoPE, GeGLU, and windows in two of three layers, in an encoder."""

from jaxllm.base.errors import ConfigError, shown
from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import rope_by_kind

LAYER = "model.layers.{layer}"
POOLING = {"cls": "first", "mean": "mean"}
TRANSFORM = (*t.linear("head/dense", "head.dense"), *t.norm("head/norm", "head.norm"))
DENSE = {"head_dense": "classifier_activation", "head_norm": True, "head_bias": True}


def _read(hf):
  if hf["classifier_pooling"] not in POOLING:
    raise ConfigError(f"config.json has classifier_pooling {shown(hf['classifier_pooling'])}; it can be cls or mean")
  every = hf["global_attn_every_n_layers"]
  windows = t.read_windows(t.layer_types(hf, lambda i: i % every), hf["local_attention"] // 2 + 1)
  scopes = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
  rope = {kind: rope_by_kind(hf, kind, scaled=True) for kind in scopes}
  theta = {kind: rope[kind].get("rope_theta", hf[key]) for kind, key in scopes.items()}
  if any(one.get("rope_type", one.get("type", "default")) != "default" for one in rope.values()):
    raise ConfigError("config.json has RoPE scaling, which a modernbert here cannot have")
  if windows:
    windows |= {"rope_local_theta": theta["sliding_attention"]}
  return windows | {
    "rope_theta": theta["full_attention"],
    "head_dense_bias": hf["classifier_bias"],
    "pooling": POOLING[hf["classifier_pooling"]],
  }


def _write(c):
  return {
    "layer_types": t.types_from_pattern(c),
    "local_attention": 128 if c.sliding_window is None else 2 * (c.sliding_window - 1),
    "global_rope_theta": c.rope_theta,
    "local_rope_theta": c.rope_local_theta or c.rope_theta,
    "classifier_activation": t.activation_name(c.head_dense or "gelu"),
    "classifier_bias": c.has_dense_bias,
    "classifier_pooling": {"first": "cls", "mean": "mean"}[c.pooling],
    "decoder_bias": c.head_bias if c.head == "lm" else True,
  }


MODERNBERT = t.Family(
  "modernbert",
  "ModernBertForMaskedLM",
  t.KEYS | t.BIASES | {"norm_eps": "norm_eps", "norm_bias": "norm_bias", "mlp_bias": "mlp_bias"},
  (
    t.embedding("embedding/tokens", "model.embeddings.tok_embeddings"),
    *t.norm("embedding/norm", "model.embeddings.norm"),
    t.Weight(("blocks/attention_norm/scale",), f"{LAYER}.attn_norm.weight", first_layer=1),
    t.Weight(("blocks/attention_norm/bias",), f"{LAYER}.attn_norm.bias", first_layer=1),
    *t.linear(t.QKV, f"{LAYER}.attn.Wqkv", t.ROWS),
    *t.linear("blocks/attention/output", f"{LAYER}.attn.Wo"),
    *t.norm("blocks/mlp_norm", f"{LAYER}.mlp_norm"),
    *t.linear(t.GATE_UP, f"{LAYER}.mlp.Wi", t.ROWS),
    *t.linear("blocks/mlp/down", f"{LAYER}.mlp.Wo"),
    *t.norm("final_norm", "model.final_norm"),
  ),
  activation="hidden_activation",
  fields={"architecture": "encoder", "norm": "layernorm", "embedding_norm": True, "first_norm": False, "init": "gpt2"},
  by_head={"lm": DENSE | {"head_bias": "decoder_bias"}, "sequence": DENSE, "token": DENSE, "span": DENSE, "none": {}},
  defaults={"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0},
  read=_read,
  write=_write,
  head="decoder.weight",
  architectures=t.classes("ModernBert"),
  more_weights=lambda c: TRANSFORM + t.linear("head", "decoder" if c.head == "lm" else "classifier"),
)
