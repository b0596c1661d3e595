"""GGUF's architectures of decoders without experts."""

from collections.abc import Callable

import numpy as np

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.gguf.table import Architecture, Metadata


def _gemma(period: int, window: int, largest: int) -> Callable[[Metadata], dict]:
  """`window`: llama.cpp's where the file does not say; 0: none."""

  def read(m):
    # llama.cpp knows the 27B models, which divide by another root, by their number of layers.
    is_largest = m.positive("block_count") == largest
    scalar = m.positive("embedding_length") // m.positive("attention.head_count")
    return {
      "layer_types": m.pattern(period if m.number("attention.sliding_window", window) else 1),
      "query_pre_attn_scalar": scalar if is_largest else m.positive("attention.key_length"),
    }

  return read


_GEMMA_KEYS = {"attention.sliding_window": "sliding_window", "final_logit_softcapping": "final_logit_softcapping"}
UNBIASED = {"attention_bias": False}
# Metadata -> config.json, and what an absent one stands for
_GRANITE = {"embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier"}
_GRANITE |= {"logit_scale": "logits_scaling", "attention.scale": "attention_multiplier"}


def _windows(period: int) -> dict[str, Callable]:
  """Windows in some layers, and how both sides say in which."""

  def write(hf):
    local = np.array([kind == "sliding_attention" for kind in hf["layer_types"]])
    return {"attention.sliding_window": hf["sliding_window"], "attention.sliding_window_pattern": local}

  def read(m):
    return {"layer_types": m.pattern(period), "sliding_window": m.number("attention.sliding_window")}

  return {"read": read, "write": write}


def _check_glm(hf):
  if hf["head_dim"] * hf["num_attention_heads"] != hf["hidden_size"]:
    raise ConfigError("GGUF has no glm model whose heads are together wider or narrower than hidden_size")
  return {}


_NORMED_LAYERS = 64  # Command R+ has norms of queries and keys, by which llama.cpp knows it
_TWO_NORMS = "blk.0.attn_norm_2.weight"


def _read_falcon(m):
  heads = m.positive("attention.head_count")
  kv_heads, two = m.number("attention.head_count_kv", heads), _TWO_NORMS in m.tensors
  new = two or 1 < kv_heads < heads
  return {
    "num_kv_heads": kv_heads,
    "multi_query": kv_heads == 1,
    "new_decoder_architecture": new,
    "num_ln_in_parallel_attn": 1 + two if new else None,
  }


_OLMO_EPS = 1e-5  # which its config.json cannot say


def _read_olmo(m):
  eps = m.number("attention.layer_norm_epsilon", _OLMO_EPS)
  if not np.isclose(eps, _OLMO_EPS, rtol=1e-3):
    raise CheckpointError(
      f"the GGUF file says attention.layer_norm_epsilon = {eps}; an olmo model here has {_OLMO_EPS}"
    )
  return {"clip_qkv": m.number("attention.clamp_kqv") or None}


def _falcon_stems(c):
  """With two norms, that before attention is the second."""
  if c.shared_norm:
    return {}
  return {"blocks/attention_norm": "blk.{}.attn_norm_2", "blocks/mlp_norm": "blk.{}.attn_norm"}


DECODERS = (
  Architecture("llama", "llama", interleaved=True, factors=True),
  Architecture("llama", "mistral", interleaved=True, windowless=True, factors=True),
  Architecture("smollm3", "smollm3", interleaved=True),
  Architecture("qwen2", "qwen2"),
  Architecture("qwen3", "qwen3", only=UNBIASED),
  Architecture(
    "phi3",
    "phi3",
    windowless=True,
    factors=True,
    read=lambda m: {
      "original_max_position_embeddings": m.number("rope.scaling.original_context_length", m.positive("context_length"))
    },
  ),
  Architecture("starcoder2", "starcoder2", only={"use_bias": True}, windowless=True, activation="hidden_act"),
  Architecture(
    "gptneox",
    "gpt_neox",
    only={"attention_bias": True},
    by_head=True,
    activation="hidden_act",
    read=lambda m: {
      "use_parallel_residual": m.flag("use_parallel_residual", True),
      "hidden_act": m.text("hidden_activation") or "gelu_pytorch_tanh",
      "rotary_emb_base": float(m.number("rope.freq_base", 10000.0)),
      "rotary_pct": m.positive("rope.dimension_count") / m.head_width,
    },
    write=lambda hf: {"use_parallel_residual": hf["use_parallel_residual"]},
  ),
  Architecture(
    "bloom", "bloom", rope=False, by_head=True, write=lambda hf: {"feed_forward_length": 4 * hf["hidden_size"]}
  ),
  Architecture(
    "falcon",
    "falcon",
    only={"alibi": False, "parallel_attn": True, "bias": False},
    by_head=True,
    activation="activation",
    read=_read_falcon,
    write=lambda hf: {"attention.head_count_kv": hf["num_kv_heads"]},
    stems=_falcon_stems,
  ),
  Architecture(
    "granite",
    "granite",
    interleaved=True,
    read=lambda m: {theirs: m.number(key, 1.0) for key, theirs in _GRANITE.items()},
    write=lambda hf: {key: float(hf[theirs]) for key, theirs in _GRANITE.items()},
  ),
  Architecture(
    "command-r",
    "cohere",
    only=UNBIASED | {"tie_word_embeddings": True},
    read=lambda m: {"use_qk_norm": m.positive("block_count") >= _NORMED_LAYERS},
  ),
  Architecture("cohere2", "cohere2", only=UNBIASED | {"tie_word_embeddings": True}, **_windows(4)),
  Architecture("chatglm", "glm", write=_check_glm),
  Architecture("glm4", "glm4"),
  Architecture(
    "olmo",
    "olmo",
    interleaved=True,
    only=UNBIASED,
    read=_read_olmo,
    write=lambda hf: (
      {"attention.layer_norm_epsilon": _OLMO_EPS} | ({"attention.clamp_kqv": hf["clip_qkv"]} if hf["clip_qkv"] else {})
    ),
  ),
  Architecture("olmo2", "olmo2", only=UNBIASED | {"tie_word_embeddings": False}),
  Architecture("olmo2", "olmo3", only=UNBIASED | {"tie_word_embeddings": False}, **_windows(4)),
  Architecture("gemma", "gemma", norm_offset=True, only=UNBIASED | {"tie_word_embeddings": True}),
  Architecture(
    "gemma2",
    "gemma2",
    optional=_GEMMA_KEYS | {"attn_logit_softcapping": "attn_logit_softcapping"},
    norm_offset=True,
    only=UNBIASED | {"tie_word_embeddings": True},
    read=_gemma(2, 4096, 46),
  ),
  Architecture(
    "gemma3",
    "gemma3_text",
    optional=_GEMMA_KEYS,
    norm_offset=True,
    only=UNBIASED,
    read=lambda m: _gemma(6, 0, 62)(m) | {"rope_local_base_freq": m.number("rope.freq_base_swa", 10000.0)},
  ),
  Architecture(
    "gpt2", "gpt2", rope=False, activation="activation_function", transposed="/(query|output|up|down)/weight$"
  ),
)
