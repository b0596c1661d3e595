"""The places in a block: small blocks by their formula, virtual tokens as keys that everybody sees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.base.errors import ConfigError
from jaxllm.inference.model import Model
from jaxllm.models.adapters import Bottleneck, is_place
from jaxllm.models.build import declare, init_params
from jaxllm.models.config import AdapterConfig, Compute, ModelConfig
from jaxllm.models.weights import map_weights_with_path

C = ModelConfig(vocab_size=40, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48, max_seq_len=32)
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12)).astype(np.int32)


def with_places(**places):
  return dataclasses.replace(C, adapter=AdapterConfig(**places))


def forward(config, params, **inputs):
  graph = declare(config, Compute(attention="xla"))[0]
  return jax.jit(lambda p: nnx.merge(graph, p)(TOKENS, **inputs)[0])(params)


def test_small_blocks_begin_as_nothing_and_follow_their_formula():
  config = with_places(bottleneck_dim=8)
  params = init_params(config, jax.random.key(0))
  bare = {k: v for k, v in params["blocks"].items() if not is_place(k)}
  np.testing.assert_array_equal(forward(config, params), forward(C, params | {"blocks": bare}))
  with nnx.use_eager_sharding(False):
    block = Bottleneck(config, Compute(), rngs=nnx.Rngs(0))
  rng = np.random.default_rng(1)
  down, up = rng.normal(size=(32, 8)), rng.normal(size=(8, 32))
  block.down.weight[...], block.up.weight[...] = jnp.float32(down), jnp.float32(up)
  h = rng.normal(size=(1, 3, 32))
  inner = np.asarray(jax.nn.gelu(jnp.float32(h @ down)), np.float64)
  np.testing.assert_allclose(block(jnp.float32(h)), h + inner @ up, atol=1e-4)


def dense_attention(query, key, value, prefix_key, prefix_value, segments):
  """softmax over the virtual tokens, and the tokens of one's segment so far; float64."""
  B, T, N, H = query.shape
  G = N // key.shape[2]
  out = np.zeros(query.shape)
  for b, t, n in np.ndindex(B, T, N):
    seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
    keys = np.concatenate([prefix_key[:, n // G], key[b, seen, n // G]])
    values = np.concatenate([prefix_value[:, n // G], value[b, seen, n // G]])
    scores = keys @ query[b, t, n] * H**-0.5
    p = np.exp(scores - scores.max())
    out[b, t, n] = (p / p.sum()) @ values
  return out


def test_virtual_tokens_are_keys_that_every_segment_sees():
  from jaxllm.models.adapters import Prefix
  from jaxllm.parallel.kernels import attention

  config = with_places(prefix_len=3)
  rng = np.random.default_rng(2)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  query, key, value = draw(2, 6, 4, 8), draw(2, 6, 2, 8), draw(2, 6, 2, 8)
  segments = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1]])
  with nnx.use_eager_sharding(False):
    prefix = Prefix(config, rngs=nnx.Rngs(0))
  prefix.key[...], prefix.value[...] = draw(3, 2, 8), draw(3, 2, 8)
  out = attention(query, key, value, segment_ids=(segments, segments), return_lse=True, backend="xla", target="cpu")
  got = prefix.join(query, *out, scale=None, softcap=None)
  want = dense_attention(query, key, value, np.asarray(prefix.key[...]), np.asarray(prefix.value[...]), segments)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_decoding_sees_them_too():
  """Cached decoding of a model with both kinds of places equals running it anew for each token."""
  config = with_places(bottleneck_dim=4, prefix_len=3)
  params = init_params(config, jax.random.key(0))
  params = map_weights_with_path(lambda path, w: w + 0.1 if is_place(path) else w, params)
  model = Model(config, params)
  ids = list(TOKENS[0, :5])
  for token in model.generate([ids], temperature=0, max_tokens=6)[0].token_ids:
    assert token == int(np.asarray(model(np.array([ids])))[0, -1].argmax())
    ids.append(token)


def test_what_cannot_be_is_refused(tmp_path):
  model = Model(with_places(bottleneck_dim=4), init_params(with_places(bottleneck_dim=4), jax.random.key(0)))
  with pytest.raises(ConfigError, match="keep it as a model directory"):
    model.save(tmp_path / "hf", format="hf")
  model.save(tmp_path / "ours")
  from jaxllm.inference.load import load_model

  np.testing.assert_array_equal(load_model(tmp_path / "ours")(TOKENS), model(TOKENS))
  with pytest.raises(ConfigError, match="prefix_len"):
    dataclasses.replace(C, architecture="encoder", adapter=AdapterConfig(prefix_len=2))
