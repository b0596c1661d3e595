"""The options that no Hugging Face family covers, against the float64 decoder in `reference.py`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import reference

from jaxllm.base.errors import ConfigError
from jaxllm.models.caches import init_cache
from jaxllm.models.config import ModelConfig

B, T, V = 2, 13, 29
BASE = ModelConfig(vocab_size=V, embed_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=24, max_seq_len=32)
ALL_BIASES = dict(attention_bias=True, attention_out_bias=True, mlp_bias=True)
WINDOW = dict(sliding_window=4, layer_pattern=("local", "global"))
CASES = {
  "alibi": dict(position="alibi"),
  "alibi-six-heads-window": dict(position="alibi", num_heads=6, num_kv_heads=6, head_dim=4, sliding_window=5),
  "sinusoidal": dict(position="sinusoidal", norm="layernorm"),
  "no-positions": dict(position="none"),
  "learned-sinks": dict(attention_sinks=True),
  "learned-sinks-window": dict(attention_sinks=True, **WINDOW),
  "sink-tokens": dict(sink_tokens=2, sliding_window=3),
  "sink-tokens-pattern": dict(sink_tokens=1, **WINDOW),
  "softcaps": dict(attention_softcap=1.0, logit_softcap=2.0),
  "qk-norm-head": dict(qk_norm="head"),
  "qk-norm-full": dict(qk_norm="full", norm="layernorm"),
  "partial-rotary": dict(rope_fraction=0.5, num_heads=2, num_kv_heads=2),
  "parallel": dict(parallel_residual=True, norm="layernorm"),
  "post": dict(norm_placement="post", norm="layernorm", final_norm=False, embedding_norm=True),
  "sandwich": dict(norm_placement="sandwich", norm_unit_offset=True),
  "output": dict(norm_placement="output"),
  "layernorm-without-bias": dict(norm="layernorm", norm_bias=False),
  "mqa-all-biases": dict(num_kv_heads=1, head_bias=True, **ALL_BIASES),
  "head-bias-tied": dict(head_bias=True),
  "untied": dict(tie_embeddings=False, embedding_scale=4.0),
}
MLPS = {f"mlp-{name}": dict(mlp=name, mlp_bias=True) for name in reference.MLPS}
# Where a token stands, or what it sees, depends on more than its place in a full row.
PLACES = [name for name in CASES if name.startswith(("alibi", "sin", "no-pos", "learned", "sink", "partial"))]


@functools.cache
def case(name):
  """(config, params, tokens, float64 logits)"""
  c = dataclasses.replace(BASE, **({"head_dim": 0} | (CASES | MLPS)[name]))
  params, tokens = oracle.random_params(c), np.random.default_rng(2).integers(0, V, (B, T))
  return c, params, tokens, np.stack([reference.logits(c, params, row) for row in tokens])


@pytest.mark.parametrize("name", [*CASES, *MLPS])
def test_logits(name):
  c, params, tokens, want = case(name)
  np.testing.assert_allclose(oracle.forward(c)(params, tokens), want, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", PLACES)
def test_cached_decode(name):
  c, params, tokens, want = case(name)
  step, cache = oracle.cached_step(c), init_cache(c, B, T)
  got, cache = step(params, tokens[:, :6], cache)
  parts = [got]
  for t in range(6, T):
    got, cache = step(params, tokens[:, t : t + 1], cache)
    parts.append(got)
  np.testing.assert_allclose(np.concatenate(parts, axis=1), want, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", PLACES)
def test_packed(name):
  """Two documents in a row, and padding, against each document alone."""
  c, params, tokens, want = case(name)
  first = 5
  row = np.concatenate([tokens[0, :first], tokens[1], [0, 0]])[None]
  segments = np.array([[1] * first + [2] * T + [0] * 2])
  positions = np.concatenate([np.arange(first), np.arange(T), [0, 0]])[None]
  got = oracle.forward(c)(params, row, positions=positions, segment_ids=segments)[0]
  np.testing.assert_allclose(got[:first], want[0, :first], rtol=0, atol=3e-5)
  np.testing.assert_allclose(got[first : first + T], want[1], rtol=0, atol=3e-5)


GRADIENTS = [
  "learned-sinks-window",
  "softcaps",
  "qk-norm-full",
  "sandwich",
  "post",
  "alibi",
  "mlp-geglu",
  "mlp-relu2",
]


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
  """Against central differences of the float64 loss, along a random direction in each parameter."""
  c, params, tokens, _ = case(name)
  tokens = tokens[:1, :6]
  _, gradients = oracle.loss_and_grad(c)(params, jnp.asarray(tokens))
  rng = np.random.default_rng(3)
  leaves, treedef = jax.tree.flatten(jax.tree.map(lambda x: np.asarray(x, np.float64), params))
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  for i, (path, gradient) in enumerate(zip(paths, jax.tree.leaves(gradients), strict=True)):
    direction = rng.standard_normal(leaves[i].shape)

    def moved(step, i=i, direction=direction):
      return treedef.unflatten([x + step * direction if j == i else x for j, x in enumerate(leaves)])

    step = 1e-5
    want = (reference.loss(c, moved(step), tokens) - reference.loss(c, moved(-step), tokens)) / (2 * step)
    got = (np.asarray(gradient, np.float64) * direction).sum()
    size = np.linalg.norm(gradient)  # of a typical derivative along such a direction
    assert abs(got - want) < 1e-6 + 2e-4 * size, path


def test_parallel_residual_takes_pre_norms_only():
  with pytest.raises(ConfigError, match=r"model\.parallel_residual needs model\.norm_placement 'pre'"):
    dataclasses.replace(BASE, parallel_residual=True, norm_placement="post")
