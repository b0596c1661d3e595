"""NEFTune: uniform noise within alpha / sqrt(T D) on what the embedding gives, and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models.build import init_params
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.noise import with_noise
from jaxllm.models.weights import dense, project_transposed, rows

MODEL = ModelConfig(vocab_size=64, embed_dim=32, num_layers=1, num_heads=2, mlp_dim=32, max_seq_len=64)


def test_noise():
  params = init_params(MODEL, jax.random.key(0))
  noisy = with_noise(params, 5.0, jax.random.key(1))
  table, same = noisy["embedding"]["tokens"], params["embedding"]["tokens"]
  ids = jnp.zeros((8, 50), jnp.int32)
  noise = np.asarray(rows(table, ids, jnp.float32) - same[0])
  bound = 5.0 / np.sqrt(50 * 32)
  assert np.abs(noise).max() <= bound * (1 + 1e-5)
  np.testing.assert_allclose(noise.std(), bound / np.sqrt(3), rtol=0.02)
  assert abs(noise.mean()) < bound / 50 and len(np.unique(noise.round(6))) > 1000
  other = with_noise(params, 5.0, jax.random.key(2))["embedding"]["tokens"]
  again = with_noise(params, 5.0, jax.random.key(1))["embedding"]["tokens"]
  assert np.array_equal(rows(again, ids, jnp.float32), rows(table, ids, jnp.float32))
  assert not np.array_equal(rows(other, ids, jnp.float32), rows(table, ids, jnp.float32))
  # As a head that is tied to it, it is what it was
  x = jax.random.normal(jax.random.key(3), (3, 32))
  np.testing.assert_array_equal(dense(table), same)
  np.testing.assert_allclose(project_transposed(x, table, Compute(matmul="xla")), x @ same.T, atol=1e-5)
  assert jax.tree.all(jax.tree.map(lambda a, b: a is b, noisy["blocks"], params["blocks"]))
