"""DeBERTa v2 and v3 (arXiv 2006.03654, 2111.09543): attention to content and, apart from it, to distances."""

import dataclasses

from jaxllm.base.errors import ConfigError
from jaxllm.interop.families import bert
from jaxllm.interop.families import table as t

LAYER = "deberta.encoder.layer.{layer}"
HEADS = bert.HEADS | {"sequence": t.linear("head/dense", "pooler.dense") + t.linear("head", "classifier"), "none": ()}
# What all published models of both versions say.
ALWAYS = {"relative_attention": True, "share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_groups": 1}
# A matrix for every tap, as one: [outputs, inputs, taps]
TAPS = t.Transform(
  lambda c, x, shapes: [x.transpose(2, 1, 0).reshape(shapes[0])],
  lambda c, weights: weights[0].reshape(c.convolution_size, c.embed_dim, -1).transpose(2, 1, 0),
)


def _read(hf):
  for key, value in ALWAYS.items():
    if hf[key] != value:
      raise ConfigError(f"config.json has {key} = {hf[key]!r}; a deberta-v2 here can only have {value!r}")
  kinds = hf["pos_att_type"] or []
  if sorted(kinds.split("|") if isinstance(kinds, str) else kinds) != ["c2p", "p2c"]:
    raise ConfigError(f"config.json has pos_att_type = {kinds}; a deberta-v2 here has both c2p and p2c")
  if hf["num_attention_heads"] > hf["hidden_size"]:
    raise ConfigError(f"config.json has {hf['num_attention_heads']} attention heads in {hf['hidden_size']} features")
  longest = hf["max_relative_positions"]
  return {
    "convolution_size": hf["conv_kernel_size"],
    "convolution_activation": t.mlp_name(hf["conv_act"] if hf["conv_kernel_size"] else "tanh", gated=False),
    "position": "learned" if hf["position_biased_input"] else "none",
    "relative_buckets": hf["position_buckets"],
    "relative_max_distance": hf["max_position_embeddings"] if longest < 1 else longest,
    "query_scale": (3 * (hf["hidden_size"] // hf["num_attention_heads"])) ** -0.5,  # of a sum of three products
  }


def _write(c):
  hf = {"pos_att_type": ["p2c", "c2p"], "position_buckets": c.relative_buckets}
  hf |= ALWAYS | {"max_relative_positions": c.relative_max_distance, "position_biased_input": c.position == "learned"}
  hf |= {"conv_kernel_size": c.convolution_size, "conv_act": t.activation_name(c.convolution_activation)}
  return hf | {"pooler_hidden_act": t.activation_name(c.head_dense or "gelu")}


DEBERTA_V2 = dataclasses.replace(
  bert.BERT,
  name="deberta-v2",
  architecture="DebertaV2ForMaskedLM",
  weights=(
    *(w for w in bert.weights("deberta") if w.ours[0].split("/")[-2] not in ("query", "key", "value")),
    *t.linears("blocks/attention", f"{LAYER}.attention.self", query="query_proj", key="key_proj", value="value_proj"),
    t.Weight(("convolution/taps/weight",), "deberta.encoder.conv.conv.weight", TAPS),
    t.Weight(("convolution/taps/bias",), "deberta.encoder.conv.conv.bias"),
    *t.norm("convolution/norm", "deberta.encoder.conv.LayerNorm"),
    t.embedding("relative_vectors", "deberta.encoder.rel_embeddings"),
    *t.norm("relative_norm", "deberta.encoder.LayerNorm"),
  ),
  fields=dict(bert.BERT.fields) | {"relative_bias": "disentangled"},
  by_head=t.encoder_heads(lm="hidden_act", sequence="pooler_hidden_act"),
  defaults={"position_buckets": -1, "share_att_key": False, "norm_rel_ebd": "none"}
  | {"conv_kernel_size": 0, "conv_act": "tanh", "conv_groups": 1},
  requires={},
  read=_read,
  write=_write,
  other_names=(  # without `legacy`, and in the files of v3
    *t.linear("head/dense", "lm_predictions.lm_head.dense"),
    *t.norm("head/norm", "lm_predictions.lm_head.LayerNorm"),
    t.Weight(("head/bias",), "lm_predictions.lm_head.bias"),
  ),
  prefix="deberta.",
  architectures=t.classes("DebertaV2"),
  more_weights=lambda c: HEADS[c.head],
  ignored=("*position_ids", "mask_predictions.*"),
)
