"""A decoder in plain float64 numpy, one token, head and layer at a time: slow, and easy to believe."""

import math

import numpy as np

_ERF = np.vectorize(math.erf)
ACTIVATIONS = {
  "silu": lambda x: x / (1 + np.exp(-x)),
  "gelu": lambda x: x * 0.5 * (1 + _ERF(x / math.sqrt(2))),
  "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
  "relu": lambda x: np.maximum(x, 0),
  "relu2": lambda x: np.maximum(x, 0) ** 2,
}
# name -> (activation, gated), said again here and not taken from the package
MLPS = {
  "swiglu": ("silu", True),
  "geglu": ("gelu", True),
  "geglu_tanh": ("gelu_tanh", True),
  "reglu": ("relu", True),
  "gelu": ("gelu", False),
  "gelu_tanh": ("gelu_tanh", False),
  "silu": ("silu", False),
  "relu": ("relu", False),
  "relu2": ("relu2", False),
}


def norm(c, p, x):
  if c.norm == "layernorm":
    x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
  return x * (p["scale"] + (1 if c.norm_unit_offset else 0)) + p.get("bias", 0)


def linear(p, x):
  return x @ p["weight"] + p.get("bias", 0)


def rotate(c, x):
  """x [T, heads, H]: the pair (i, i + r / 2) of position t is a complex number turned by t theta^(-2i/r)."""
  r = int(c.head_dim * c.rope_fraction)
  angles = np.arange(len(x))[:, None] * c.rope_theta ** (-np.arange(0, r, 2) / r)
  turned = (x[..., : r // 2] + 1j * x[..., r // 2 : r]) * np.exp(1j * angles)[:, None]
  return np.concatenate([turned.real, turned.imag, x[..., r:]], axis=-1)


def slope(num_heads, n):
  """Press et al.: for a power of two 2^(-8 (n + 1) / N); else the next power's odd ones after those."""
  power = 2 ** int(math.log2(num_heads))
  return 2 ** (-8 * (n + 1) / power) if n < power else 2 ** (-8 * (2 * (n - power) + 1) / (2 * power))


def attention(c, p, x, local):
  T = len(x)
  q, k, v = linear(p["query"], x), linear(p["key"], x), linear(p["value"], x)
  if c.qk_norm == "full":
    q, k = norm(c, p["query_norm"], q), norm(c, p["key_norm"], k)
  q, k, v = (y.reshape(T, -1, c.head_dim) for y in (q, k, v))
  if c.qk_norm == "head":
    q, k = norm(c, p["query_norm"], q), norm(c, p["key_norm"], k)
  if c.position == "rope":
    q, k = rotate(c, q), rotate(c, k)
  out = np.zeros_like(q)
  for n in range(c.num_heads):
    group = n // (c.num_heads // c.num_kv_heads)
    for t in range(T):
      seen = [s for s in range(t + 1) if not local or t - s < c.sliding_window or s < c.sink_tokens]
      scores = k[seen, group] @ q[t, n] * (c.query_scale or c.head_dim**-0.5)
      if c.attention_softcap:
        scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
      if c.position == "alibi":
        scores = scores - slope(c.num_heads, n) * (t - np.array(seen))
      weights = np.exp(scores)
      total = weights.sum() + (np.exp(p["sinks"][n]) if c.attention_sinks else 0)
      out[t, n] = weights @ v[seen, group] / total
  return linear(p["output"], out.reshape(T, -1))


def mlp(c, p, x):
  activation, gated = MLPS[c.mlp]
  if gated:
    return linear(p["down"], ACTIVATIONS[activation](linear(p["gate"], x)) * linear(p["up"], x))
  return linear(p["down"], ACTIVATIONS[activation](linear(p["up"], x)))


def block(c, p, x, local):
  attend = lambda x: attention(c, p["attention"], x, local)  # noqa: E731
  feed = lambda x: mlp(c, p["mlp"], x)  # noqa: E731
  before_attention = lambda x: norm(c, p["attention_norm"], x)  # noqa: E731
  before_mlp = lambda x: norm(c, p["mlp_norm"], x)  # noqa: E731
  after_attention = lambda x: norm(c, p["attention_post_norm"], x)  # noqa: E731
  after_mlp = lambda x: norm(c, p["mlp_post_norm"], x)  # noqa: E731
  if c.parallel_residual:
    return x + attend(before_attention(x)) + feed(before_mlp(x))
  if c.norm_placement == "pre":
    x = x + attend(before_attention(x))
    return x + feed(before_mlp(x))
  if c.norm_placement == "post":
    x = after_attention(x + attend(x))
    return after_mlp(x + feed(x))
  if c.norm_placement == "sandwich":
    x = x + after_attention(attend(before_attention(x)))
    return x + after_mlp(feed(before_mlp(x)))
  x = x + after_attention(attend(x))
  return x + after_mlp(feed(x))


def take_layer(tree, i):
  return {key: take_layer(v, i) if isinstance(v, dict) else v[i] for key, v in tree.items()}


def to_float64(tree):
  return {key: to_float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for key, v in tree.items()}


def logits(c, params, tokens):
  """float64 logits [T, V] of one sequence [T]."""
  p, D = to_float64(params), c.embed_dim
  x = p["embedding"]["tokens"][tokens]
  if c.embedding_scale:
    x = x * c.embedding_scale
  if c.position == "learned":
    x = x + p["embedding"]["positions"][: len(tokens)]
  if c.position == "sinusoidal":
    for t in range(len(tokens)):
      for i in range(D // 2):
        angle = t / 10000 ** (2 * i / D)
        x[t, i] += math.sin(angle)
        x[t, i + D // 2] += math.cos(angle)
  if c.embedding_norm:
    x = norm(c, p["embedding"]["norm"], x)
  pattern = c.layer_pattern or (("local",) if c.sliding_window else ("global",))
  for i in range(c.num_layers):
    x = block(c, take_layer(p["blocks"], i), x, pattern[i % len(pattern)] == "local")
  if c.final_norm:
    x = norm(c, p["final_norm"], x)
  out = x @ (p["embedding"]["tokens"].T if c.tie_embeddings else p["head"]["weight"])
  if c.head_bias:
    out = out + p["head"]["bias"]
  return c.logit_softcap * np.tanh(out / c.logit_softcap) if c.logit_softcap else out


def loss(c, params, tokens):
  """Mean next-token cross-entropy of a batch [B, T]."""
  total = 0.0
  for row in tokens:
    z = logits(c, params, row)[:-1]
    z = z - z.max(-1, keepdims=True)
    total += (np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), row[1:]]).mean()
  return total / len(tokens)
