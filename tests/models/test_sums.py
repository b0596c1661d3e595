"""Gradients of parameters, summed over many tokens in bfloat16 models, against float64.

Cotangents are positive, so that a sum in bfloat16 would stop growing after a few hundred of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.kernels import grouped_matmul
from jaxllm.kernels.elementwise import rms_norm
from jaxllm.kernels.matmul import matmul
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.linear import Linear
from jaxllm.models.moe import with_capacity
from jaxllm.models.norms import Norm
from jaxllm.models.weights import rows
from jaxllm.parallel.config import AxisRules, MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.rows import add_rows
from jaxllm.parallel.sharding import activation_sharding

TOKENS, I, O = 10_000, 8, 6
rng = np.random.default_rng(0)


def positive(*shape, dtype=jnp.bfloat16):
  return jnp.asarray(rng.uniform(0.5, 1.5, shape), dtype)


def exact(a):
  return np.asarray(a, np.float64)


def check(gradient, want, weight, rtol=1e-4):
  """float32 masters: as exact as float32; weights of 16 bits: rounded once."""
  assert gradient.dtype == weight.dtype
  np.testing.assert_allclose(exact(gradient), want, rtol=rtol if weight.dtype == jnp.float32 else 2**-8)


def pull(f, weight, dy):
  return jax.jit(lambda w, dy: jax.vjp(f, w)[1](dy)[0])(weight, dy)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_policy_that_keeps_products_keeps_them(dtype, capsys):
  """`remat` "dots" and "offload" must see the product inside its rule for the gradient."""
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  layer = jax.checkpoint(lambda x, w: jnp.sin(matmul(jnp.sin(matmul(x, w)), w)), policy=policy)
  jax.ad_checkpoint.print_saved_residuals(layer, positive(40, I), positive(I, I, dtype=dtype))
  assert capsys.readouterr().out.count("output of dot_general") == 2


def split(build, dtype):
  with nnx.use_eager_sharding(False):
    graph, params = nnx.split(build())
  return graph, jax.tree.map(lambda p: p.astype(dtype), nnx.to_pure_dict(params))


@pytest.mark.parametrize("backend, transposed", [("xla", False), ("xla", True), ("cpu", False)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_matrix(backend, transposed, dtype):
  x, dy, w = positive(TOKENS, I, dtype=dtype), positive(TOKENS, O, dtype=dtype), positive(I, O, dtype=jnp.float32)
  w = w.T if transposed else w
  y, back = jax.vjp(lambda x, w: matmul(x, w, backend=backend, transposed=transposed), x, w)
  dx, dw = back(dy)
  want = exact(x).T @ exact(dy)
  check(dw, want.T if transposed else want, w)
  rounded = exact(w.astype(dtype))
  rounded = rounded.T if transposed else rounded
  assert (y.dtype, dx.dtype) == (dtype, dtype)
  np.testing.assert_allclose(exact(y), exact(x) @ rounded, rtol=2**-7)
  np.testing.assert_allclose(exact(dx), exact(dy) @ rounded.T, rtol=2**-7)


def test_a_narrower_matrix_is_widened():
  """A router multiplies float32 states by weights that were stored in 16 bits; the states are not rounded."""
  x, w = positive(40, I, dtype=jnp.float32), positive(I, O)
  for backend in ("xla", "cpu"):
    np.testing.assert_allclose(exact(matmul(x, w, backend=backend)), exact(x) @ exact(w), rtol=1e-6)


def test_no_rounded_copy_of_a_matrix_is_kept():
  x, w = positive(40, I), positive(I, O, dtype=jnp.float32)
  kept = jax.vjp(matmul, x, w)[1]
  assert sorted((a.dtype.name, a.shape) for a in jax.tree.leaves(kept) if a.size > 1) == [
    ("bfloat16", x.shape), ("float32", w.shape)
  ]  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bias(dtype):
  graph, params = split(
    lambda: Linear(I, O, ("embed", "mlp"), init=nnx.initializers.ones, bias=True, rngs=nnx.Rngs(0)), dtype
  )
  dy = positive(TOKENS, O)
  grads = pull(lambda p: nnx.merge(graph, p)(positive(TOKENS, I)), params, dy)
  check(grads["bias"], exact(dy).sum(0), params["bias"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norm(kind, dtype):
  config = ModelConfig(norm=kind, norm_bias=True, embed_dim=I, num_heads=2)
  graph, params = split(lambda: Norm(config, Compute(elementwise="xla"), rngs=nnx.Rngs(0)), dtype)
  x = jnp.asarray(np.arange(I) * rng.uniform(1, 2, (TOKENS, 1)), jnp.bfloat16)
  dy = positive(TOKENS, I)
  grads = pull(lambda p: nnx.merge(graph, p)(x), params, dy)
  y = exact(x) - (exact(x).mean(-1, keepdims=True) if kind == "layernorm" else 0)
  y = y / np.sqrt((y * y).mean(-1, keepdims=True) + config.norm_eps)
  check(grads["scale"], (y * exact(dy)).sum(0), params["scale"])
  if kind == "layernorm":
    check(grads["bias"], exact(dy).sum(0), params["bias"])


def test_norm_on_the_cpu():
  x, dy, scale = positive(TOKENS, 16), positive(TOKENS, 16), positive(16, dtype=jnp.float32)
  gradient = pull(lambda w: rms_norm(x, w, eps=1e-6, backend="cpu"), scale, dy)
  check(gradient, (exact(x) / np.sqrt((exact(x) ** 2).mean(-1, keepdims=True)) * exact(dy)).sum(0), scale)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_frequent_token(dtype):
  """One id in every place but one; also what positions and token types use."""
  ids, dy = np.full((4, TOKENS // 4), 3), positive(4, TOKENS // 4, O)
  ids[0, 0] = 1
  table = positive(5, O, dtype=dtype)
  gradient = pull(lambda table: rows(table, jnp.asarray(ids), "bfloat16"), table, dy)
  want = np.zeros((5, O))
  np.add.at(want, ids, exact(dy))
  check(gradient, want, table)


def test_rows_past_the_table():
  looked_up = rows(jnp.ones((3, 2)), jnp.asarray([[0, 2, 3]]), "bfloat16")
  assert looked_up.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.isnan(exact(looked_up))[0, :, 0], [False, False, True])


@pytest.mark.parametrize("axis", ["vocab", None])
@pytest.mark.parametrize(
  "sizes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, expert=2, context=2), dict(context=4)], ids=str
)
def test_tokens_over_a_mesh(sizes, axis):
  ids, dy = rng.integers(0, 18, (8, 12)), rng.standard_normal((8, 12, 16)).astype(np.float32)  # 16 and 17: past it
  want = np.zeros((18, 16))
  np.add.at(want, ids, exact(dy))

  def on_mesh(dy, ids):
    with activation_sharding(make_mesh(MeshConfig(**sizes)), AxisRules()):
      return add_rows(dy, ids, 16, axis)

  np.testing.assert_allclose(jax.jit(on_mesh)(dy, ids), want[:16], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rules", [AxisRules(vocab=("fsdp",), embed=()), AxisRules(embed=("tensor",), vocab=())])
@pytest.mark.parametrize("shape", [(8, 12), (3, 5)])
def test_tokens_over_other_meshes(rules, shape):
  """Rules that split a table over its tokens' devices, or over others; tokens that do not divide."""
  ids, dy = rng.integers(0, 16, shape), rng.standard_normal((*shape, 16)).astype(np.float32)
  want = np.zeros((16, 16))
  np.add.at(want, ids, exact(dy))

  def on_mesh(dy, ids):
    with activation_sharding(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), rules):
      return add_rows(dy, ids, 16, "vocab")

  np.testing.assert_allclose(jax.jit(on_mesh)(dy, ids), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_experts(dtype):
  x, dy, w = positive(TOKENS, I), positive(TOKENS, O), positive(2, I, O, dtype=dtype)
  cut = TOKENS // 4
  gradient = pull(lambda w: grouped_matmul(x, w, jnp.asarray([cut, TOKENS - cut])), w, dy)
  want = [exact(x[part]).T @ exact(dy[part]) for part in (slice(cut), slice(cut, None))]
  check(gradient, np.stack(want), w)


def test_experts_with_a_capacity():
  """Every token goes to both experts, with the weights 1 and 2."""
  B, T = 4, TOKENS // 4
  x, dy, up = positive(B, T, I), positive(B, T, I), positive(2, I, I, dtype=jnp.float32)
  weights = jnp.broadcast_to(jnp.asarray([1.0, 2.0]), (B, T, 2))
  experts = jnp.broadcast_to(jnp.asarray([0, 1]), (B, T, 2))
  feed = lambda multiply, x, matrices: multiply(x, matrices[1], embed=1)  # noqa: E731

  def layer(up):
    return with_capacity(feed, x, weights, experts, jnp.ones((B, T), bool), (None, up, up), 1.0)[0]

  one = exact(x).reshape(-1, I).T @ exact(dy).reshape(-1, I)
  check(pull(layer, up, dy), np.stack([one, 2 * one]), up)
