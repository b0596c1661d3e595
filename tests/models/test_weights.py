"""Weights are values: every kind equals its dense matrix, in every product, in every way of running the layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.inference.model import Model
from jaxllm.kernels import dequantize, quantize
from jaxllm.models import weights
from jaxllm.models.build import declare, init_params, stack_layers, unstack_layers
from jaxllm.models.config import Compute, MLAConfig, ModelConfig, MoEConfig
from jaxllm.models.lora import DoraWeight, LoraWeight, column_lengths
from jaxllm.models.quantization import DoubleQuantizedWeight, double_quantize
from jaxllm.models.weights import PerLayer

COMPUTE = Compute(matmul="xla")
C = ModelConfig(vocab_size=64, embed_dim=128, num_layers=3, num_heads=2, mlp_dim=128, max_seq_len=32)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32) * shape[-2] ** -0.5


def lora(base, seed=0, scale=0.5, rank=4):
  *lead, I, O = base.shape
  return LoraWeight(base, normal(seed, *lead, I, rank), normal(seed + 1, *lead, rank, O), scale=scale)


def dora(base, seed=0):
  inner = lora(base, seed)
  magnitude = column_lengths(base) * (1 + 0.3 * normal(seed + 2, *base.shape[:-2], 1, base.shape[-1])[..., 0, :])
  return DoraWeight(inner.base, inner.a, inner.b, scale=inner.scale, magnitude=magnitude)


def by_matrix(base, seed=0):
  """A LoRA whose factor, and whose rank, differ by layer."""
  inner = lora(base, seed)
  lead = base.shape[:-2]
  factors = 1 + jnp.arange(np.prod(lead, dtype=int), dtype=jnp.float32).reshape(lead)
  rank = jnp.arange(4) < 1 + jnp.minimum(factors, 3)[..., None]
  a, b = inner.a * rank[..., None, :], inner.b * rank[..., :, None]
  return dataclasses.replace(inner, a=a, b=b, scales=factors)


KINDS = {
  "plain": lambda w: w,
  "int8": lambda w: quantize(w, "int8"),
  "int4": lambda w: quantize(w, "int4", 32, asymmetric=True),
  "nf4": lambda w: quantize(w, "nf4", 64),
  "nf4 twice": lambda w: double_quantize(quantize(w, "nf4", 64)),
  "lora": lora,
  "lora by matrix": by_matrix,
  "dora": dora,
  "dora over nf4": lambda w: dora(quantize(w, "nf4", 64)),
  "lora over nf4 twice": lambda w: lora(double_quantize(quantize(w, "nf4", 64))),
  "lora over nf4": lambda w: lora(quantize(w, "nf4", 64)),
  "lora over lora": lambda w: lora(lora(w), 7),
}


def exact(w):
  """The matrix by its definition."""
  if isinstance(w, PerLayer):
    return np.stack([exact(layer) for layer in w.layers])
  if isinstance(w, LoraWeight):
    factor = w.scale * (1.0 if w.scales is None else np.asarray(w.scales)[..., None, None])
    total = exact(w.base) + factor * (np.asarray(w.a, np.float64) @ np.asarray(w.b, np.float64))
    if isinstance(w, DoraWeight):
      total *= np.asarray(w.magnitude)[..., None, :] / np.linalg.norm(total, axis=-2, keepdims=True)
    return total
  if isinstance(w, DoubleQuantizedWeight):
    w = w.single()
  return np.asarray(dequantize(w) if hasattr(w, "scales") else w, np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_products(kind):
  w, x, y = KINDS[kind](normal(1, 128, 48)), normal(2, 5, 128), normal(3, 5, 48)
  want = exact(w)
  assert w.shape == (128, 48) and w.ndim == 2 and w.dtype == jnp.float32
  np.testing.assert_allclose(weights.project(x, w, COMPUTE), x @ want, atol=1e-5)
  np.testing.assert_allclose(weights.project_transposed(y, w, COMPUTE), y @ want.T, atol=1e-5)
  np.testing.assert_allclose(weights.dense(w), want, atol=1e-6)
  ids = jnp.array([[3, 127], [0, 3]])
  np.testing.assert_allclose(weights.rows(w, ids, jnp.float32), want[ids], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_grouped(kind):
  w, x = KINDS[kind](normal(1, 3, 128, 48)), normal(2, 10, 128)
  sizes = jnp.array([4, 0, 6])
  want = np.concatenate([x[:4] @ exact(w)[0], x[4:] @ exact(w)[2]])
  np.testing.assert_allclose(weights.grouped(x, w, sizes, COMPUTE), want, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
  """Of x and of what is trained, against those of the dense matrix."""
  w, x, dy = KINDS[kind](normal(1, 128, 48)), normal(2, 5, 128), normal(3, 5, 48)
  trained, frozen = weights.partition(w, weights.trained_parts(w))
  run = lambda x, t: (weights.project(x, weights.combine(t, frozen), COMPUTE) * dy).sum()  # noqa: E731
  dx, dw = jax.grad(run, (0, 1))(x, trained)
  np.testing.assert_allclose(dx, dy @ exact(w).T, atol=1e-5)
  matrix = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
  if kind == "plain":
    np.testing.assert_allclose(dw, matrix, atol=1e-4)
  elif isinstance(w, LoraWeight):
    if isinstance(w, DoraWeight):  # through the direction, whose length is a constant, and through the magnitude
      length = exact(w) / np.asarray(w.magnitude)
      np.testing.assert_allclose(dw.magnitude, (matrix * length).sum(0), atol=1e-4)
      matrix = matrix * np.asarray(w.factor(), np.float64)
    matrix = matrix * (w.scale if w.scales is None else w.scale * np.asarray(w.scales))
    np.testing.assert_allclose(dw.a, matrix @ np.asarray(w.b).T, atol=1e-4)
    np.testing.assert_allclose(dw.b, np.asarray(w.a).T @ matrix, atol=1e-4)
  else:
    assert not jax.tree.leaves(dw)


def mixed(params, kind_of):
  """The parameters with another kind of weight for each path; the matrices of layers only."""

  def one(path, w):
    return KINDS[kind_of(path)](w) if weights.is_quantizable(path) else w

  return weights.map_weights_with_path(one, params)


def plain(params):
  return weights.map_weights(lambda w: jnp.asarray(exact(w), jnp.float32), params)


@functools.cache
def forward(config, unroll=None):
  graph = declare(config, Compute(attention="xla", matmul="xla", unroll_layers=unroll))[0]
  return jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens)[0])


MODELS = {
  "dense": C,
  "experts": ModelConfig(
    vocab_size=64, embed_dim=128, num_layers=3, num_heads=2, max_seq_len=32, tie_embeddings=False,
    moe=MoEConfig(num_experts=4, mlp_dim=128, first_dense_layers=1, shared_mlp_dim=128),
  ),
  "latent": ModelConfig(
    vocab_size=64, embed_dim=128, num_layers=3, num_heads=2, max_seq_len=32,
    mla=MLAConfig(kv_lora_rank=128, nope_head_dim=64, rope_head_dim=64, value_head_dim=64),
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_mixture_scanned_unrolled_and_decoded(name):
  """Kinds differ by parameter, and, layer by layer, within one."""
  config, order = MODELS[name], list(KINDS)
  params = init_params(config, jax.random.key(0))
  tree = mixed(params, lambda path: order[len(path) % len(order)])
  want = forward(config)(plain(tree), TOKENS)
  for unroll in (1, 3):
    np.testing.assert_allclose(forward(config, unroll)(tree, TOKENS), want, atol=2e-4)
  apart = unstack_layers(tree)
  np.testing.assert_allclose(forward(config)(apart, TOKENS), want, atol=2e-4)
  jax.tree.map(np.testing.assert_array_equal, stack_layers(apart), tree)

  def other_layers(path, w):  # a layer each of another kind
    if not isinstance(w, PerLayer) or not weights.is_quantizable(path):
      return w
    kinds = [order[(len(path) + i) % len(order)] for i in range(len(w.layers))]
    return PerLayer(tuple(KINDS[kind](layer) for kind, layer in zip(kinds, w.layers)))

  uneven = weights.map_weights_with_path(other_layers, unstack_layers(params))
  want = forward(config)(plain(uneven), TOKENS)
  np.testing.assert_allclose(forward(config)(uneven, TOKENS), want, atol=2e-4)
  if name != "dense":  # decoding multiplies by them in the same way
    return
  texts = [
    Model(config, tree).generate([list(TOKENS[0, :5]), list(TOKENS[1, :9])], temperature=0, max_tokens=8)
    for tree in (uneven, plain(uneven))
  ]
  assert [c.token_ids for c in texts[0]] == [c.token_ids for c in texts[1]]


def test_a_tied_head_and_an_embedding_with_an_adapter():
  params = init_params(C, jax.random.key(0))
  params["embedding"]["tokens"] = lora(params["embedding"]["tokens"])
  np.testing.assert_allclose(forward(C)(params, TOKENS), forward(C)(plain(params), TOKENS), atol=1e-4)


def test_saving_writes_the_dense_matrices(tmp_path):
  from jaxllm.inference.load import load_model

  tree = mixed(init_params(C, jax.random.key(0)), lambda path: "lora over nf4")
  model = Model(C, tree)
  model.save(tmp_path / "model")
  np.testing.assert_allclose(load_model(tmp_path / "model")(TOKENS), model(TOKENS), atol=1e-4)


def test_casting_leaves_codes_and_scales():
  tree = weights.cast({"w": lora(quantize(normal(0, 128, 8), "nf4", 64)), "scale": jnp.ones(3)}, jnp.bfloat16)
  found = tree["w"].a.dtype, tree["w"].base.scales.dtype, tree["scale"].dtype
  assert found == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize(
  "format, group, shape, ways, splits",
  [
    ("int8", None, (512, 64), 4, True),
    ("int8", None, (512, 64), 8, False),  # blocks of 128 codes
    ("int4", 32, (512, 64), 2, True),
    ("int4", 32, (512, 64), 4, False),  # blocks of 256
    ("nf4", 64, (300, 64), 1, False),  # padded
    ("int4", 384, (768, 66), 3, False),  # a group would be cut
  ],
)
def test_codes_are_split_whole_or_not_at_all(format, group, shape, ways, splits):
  if shape[0] % (group or 1):
    group = None
  axes = weights.part_axes(quantize(normal(0, *shape), format, group), ("embed", "mlp"), lambda axis: ways)
  inputs = "embed" if splits else None
  assert axes.values == ("mlp", inputs)
  assert axes.scales == (None if group is None else inputs, "mlp")
