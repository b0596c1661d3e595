"""T5 (arXiv 1910.10683), T5 1.1, FLAN-T5 (2210.11416); encoders alone: Sentence-T5 (2108.08877), GTR (2112.07899)."""

from jaxllm.base.errors import ConfigError
from jaxllm.interop.families import table as t
from jaxllm.models.config import MLPS

ATTENTION = {"query": "q", "key": "k", "value": "v", "output": "o"}


def _stack(c, ours, side):
  """The layers of one side, in which the feed-forward's matrices go by other names where there is a gate."""
  layer, mlp = f"{side}.block.{{layer}}.layer", 2 if side == "decoder" else 1
  names = {"gate": "wi_0", "up": "wi_1" if MLPS[c.mlp][1] else "wi", "down": "wo"}
  return (
    t.embedding(f"{ours}relative_bias", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"),
    *t.linears(f"{ours}blocks/attention", f"{layer}.0.SelfAttention", **ATTENTION),
    *t.norm(f"{ours}blocks/attention_norm", f"{layer}.0.layer_norm"),
    *t.linears(f"{ours}blocks/cross_attention", f"{layer}.1.EncDecAttention", **ATTENTION),
    *t.norm(f"{ours}blocks/cross_attention_norm", f"{layer}.1.layer_norm"),
    *t.linears(f"{ours}blocks/mlp", f"{layer}.{mlp}.DenseReluDense", **names),
    *t.norm(f"{ours}blocks/mlp_norm", f"{layer}.{mlp}.layer_norm"),
    *t.norm(f"{ours}final_norm", f"{side}.final_layer_norm"),
  )


def _weights(c):
  if c.architecture == "encoder":
    return _stack(c, "", "encoder")
  head = t.linear("head", "qa_outputs" if c.head == "span" else "lm_head")
  return _stack(c, "", "decoder") + _stack(c, "encoder/", "encoder") + head


def _read(hf):
  kind, named = hf["feed_forward_proj"], t.class_of(hf) or ""
  activation = hf.get("dense_act_fn", "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-"))
  fields = {"mlp": t.mlp_name(activation, gated=hf.get("is_gated_act", kind.startswith("gated-")))}
  if named.endswith("T5EncoderModel"):
    sizes = {"num_layers": hf["num_layers"], "num_encoder_layers": 0, "decoder_start_id": 0}
    return fields | sizes | {"architecture": "encoder", "head": "none"}
  if not hf.get("is_encoder_decoder", True):
    raise ConfigError("config.json has is_encoder_decoder = False, and is not of a class for the encoder alone")
  scaled = hf.get("scale_decoder_outputs", hf["tie_word_embeddings"]) and not named.endswith("ForQuestionAnswering")
  return fields | {"logit_scale": hf["d_model"] ** -0.5 if scaled else None}


def _write(c):
  kind = t.activation_name(c.mlp)
  if MLPS[c.mlp][1]:
    kind = "gated-" + {"gelu_pytorch_tanh": "gelu", "gelu": "gelu_python"}.get(kind, kind)
  hf = {"feed_forward_proj": kind, "is_encoder_decoder": c.architecture != "encoder"}
  if c.architecture == "encoder":
    return hf | {"num_layers": c.num_layers, "num_decoder_layers": c.num_layers, "architectures": ["T5EncoderModel"]}
  return hf | ({"scale_decoder_outputs": c.logit_scale is not None} if c.head == "lm" else {})


KEYS = {"vocab_size": "vocab_size", "embed_dim": "d_model", "mlp_dim": "d_ff", "num_heads": "num_heads"}
KEYS |= {"head_dim": "d_kv", "norm_eps": "layer_norm_epsilon", "tie_embeddings": "tie_word_embeddings"}
KEYS |= {"num_layers": "num_decoder_layers", "num_encoder_layers": "num_layers", "max_seq_len": "n_positions"}
KEYS |= {"relative_buckets": "relative_attention_num_buckets", "decoder_start_id": "decoder_start_token_id"}
T5 = t.Family(
  "t5",
  "T5ForConditionalGeneration",
  KEYS | {"relative_max_distance": "relative_attention_max_distance"},
  (t.embedding("embedding/tokens", "shared"),),
  activation=None,
  fields={"architecture": "encoder_decoder", "position": "relative", "query_scale": 1.0, "init": "fan_in"},
  by_head={"span": {"head_bias": True}},
  defaults={"n_positions": 512, "decoder_start_token_id": 0, "tie_word_embeddings": True},
  requires={"is_decoder": False},
  read=_read,
  write=_write,
  prefix="",
  architectures=t.classes("T5", "span"),
  others=("T5EncoderModel",),
  more_weights=_weights,
  follows={"num_decoder_layers": "num_layers"},
  copies={f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")},
  ignored=("*.EncDecAttention.relative_attention_bias.weight",),  # the first checkpoints have it, and no code reads it
)
