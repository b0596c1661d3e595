"""Every mesh of eight devices gives the loss and the gradients of one device."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.base.errors import ConfigError
from jaxllm.models.build import check_model_on_mesh, declare, init_params
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.parallel.config import AxisRules, MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.sharding import activation_sharding, batch_sharding, param_shardings, partition_spec

sys.path.append(str(Path(__file__).parents[1] / "models"))
from oracle import cross_entropy, jit

RULES = AxisRules()
C = ModelConfig(
  vocab_size=40,
  embed_dim=16,
  num_layers=2,
  num_heads=8,
  mlp_dim=32,
  max_seq_len=32,
  attention_bias=True,
  sliding_window=5,
  tie_embeddings=False,
)
TOKENS = np.random.default_rng(0).integers(0, 40, (8, 16))
MESHES = [(d, f, 8 // (d * f)) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]


def loss_and_grad(mesh=None):
  graph, shapes, axes = declare(C, Compute(attention="xla", unroll_layers=1))

  def loss(params, tokens):
    return cross_entropy(nnx.merge(graph, params)(tokens)[0], tokens)

  if mesh is None:
    return jit(jax.value_and_grad(loss))
  shardings = param_shardings(shapes, axes, mesh, RULES)

  def on_mesh(params, tokens):
    with activation_sharding(mesh, RULES):
      return jax.value_and_grad(loss)(params, tokens)

  return jit(on_mesh, in_shardings=(shardings, batch_sharding(mesh, RULES)), out_shardings=(None, shardings))


@functools.cache
def single_device():
  params = init_params(C, jax.random.key(0))
  return params, loss_and_grad()(params, jnp.asarray(TOKENS))


def compare(sizes):
  mesh = make_mesh(MeshConfig(**sizes))
  params, (want_loss, want_gradients) = single_device()
  params = jax.device_put(params, param_shardings(*declare(C)[1:], mesh, RULES))
  loss, gradients = loss_and_grad(mesh)(params, jax.device_put(TOKENS, batch_sharding(mesh, RULES)))
  assert abs(float(loss) - float(want_loss)) < 1e-6
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), gradients, want_gradients)
  return params, gradients


@pytest.mark.parametrize("data, fsdp, tensor", MESHES)
def test_data_fsdp_tensor(data, fsdp, tensor, capfd):
  for tree in compare(dict(data=data, fsdp=fsdp, tensor=tensor)):
    weight = tree["blocks"]["mlp"]["up"]["weight"]  # [L, D, F]: D over fsdp, F over tensor
    assert weight.sharding.shard_shape(weight.shape) == (2, 16 // fsdp, 32 // tensor)
  # XLA's words for an activation that it had to gather whole because our constraints contradict each other
  assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=2, tensor=2), dict(fsdp=8)])
def test_init(sizes):
  """The same weights on every mesh, each made where it lives."""
  mesh = make_mesh(MeshConfig(**sizes))
  params = init_params(C, jax.random.key(0), mesh)
  want = single_device()[0]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7), params, want)
  weight = params["blocks"]["mlp"]["up"]["weight"]
  assert weight.sharding.shard_shape(weight.shape) == (
    2,
    16 // mesh.shape["fsdp"],
    32 // mesh.shape["tensor"],
  )


@pytest.mark.parametrize("sizes", [dict(data=1, context=8), dict(data=2, context=2, tensor=2)])
def test_context(sizes):
  compare(sizes)


def test_there_are_ten_meshes():
  assert len(MESHES) == 10


def test_unknown_logical_axis():
  with pytest.raises(ConfigError, match=r"blocks/x has the logical axis 'colour', which mesh\.rules does not name"):
    partition_spec(("embed", "colour"), RULES, "blocks/x")


def test_collision():
  rules = dataclasses.replace(RULES, mlp=("fsdp",))
  with pytest.raises(ConfigError, match=r"both 'embed' and 'mlp' of w on the mesh axis 'fsdp'"):
    partition_spec(("embed", "mlp"), rules, "w")


def test_rule_with_an_unknown_mesh_axis():
  with pytest.raises(ConfigError, match=r"mesh\.rules\.mlp names 'model'; the mesh axes are data"):
    AxisRules(mlp=("model",))


@pytest.mark.parametrize(
  "change, sizes, message",
  [
    (dict(num_kv_heads=2), dict(data=2, tensor=4), r"model\.num_kv_heads 2 .* mesh\.tensor = 4"),
    (
      dict(num_heads=4, num_kv_heads=4, head_dim=2),
      dict(tensor=8),
      r"model\.num_kv_heads 4 .*mesh\.tensor = 8",
    ),
    (dict(mlp_dim=36), dict(data=1, tensor=8), r"model\.mlp_dim 36 .* mesh\.tensor = 8"),
    (dict(vocab_size=41), dict(data=4, tensor=2), r"model\.vocab_size 41 .* mesh\.tensor = 2"),
    (dict(embed_dim=36, head_dim=2), dict(data=1, fsdp=8), r"model\.embed_dim 36 .* mesh\.fsdp = 8"),
  ],
)
def test_model_that_does_not_fit_the_mesh(change, sizes, message):
  mesh, config = make_mesh(MeshConfig(**sizes)), dataclasses.replace(C, **change)
  with pytest.raises(ConfigError, match=message):
    check_model_on_mesh(config, mesh)
  with pytest.raises(ConfigError, match=message):
    init_params(config, jax.random.key(0), mesh)


def test_shared_key_heads_may_be_kept_whole():
  """What the message of `check_model_on_mesh` proposes works."""
  rules = dataclasses.replace(RULES, kv_heads=())
  mesh = make_mesh(MeshConfig(data=2, tensor=4))
  params = init_params(dataclasses.replace(C, num_kv_heads=2), jax.random.key(0), mesh, rules)
  weight = params["blocks"]["attention"]["key"]["weight"]
  assert weight.sharding.shard_shape(weight.shape) == weight.shape


@pytest.mark.parametrize(
  "sizes, message",
  [
    (dict(data=3, fsdp=3), r"needs 9 devices but there are 8"),
    (dict(data=-1, tensor=3), r"take 3 devices, which does not divide the 8"),
  ],
)
def test_mesh_that_does_not_fit_the_devices(sizes, message):
  with pytest.raises(ConfigError, match=message):
    make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize(
  "options",
  [
    dict(window=5, segments=True, sinks=True),
    dict(position="alibi"),
    dict(position="relative"),
    dict(offset=True),
    dict(rows=3),
    dict(rules=dataclasses.replace(RULES, kv_heads=())),
  ],
  ids=["packed", "alibi", "bias", "offset", "few rows", "whole key heads"],
)
@pytest.mark.parametrize("sizes", [dict(tensor=2, context=2), dict(tensor=4), dict(context=4)], ids=str)
def test_attention_by_shards(sizes, options):
  """On accelerators every device runs the kernel on its own part; here that kernel is XLA's."""
  from jaxllm.kernels import Visibility, flash_attention
  from jaxllm.parallel.kernels import attention

  rng = np.random.default_rng(0)
  B, T, N, K = options.get("rows", 8), 16, 8, 2 if "rules" in options else 4
  S = 24 if options.get("offset") else T
  q, k, v = (jnp.asarray(rng.standard_normal((B, n, h, 8)), jnp.float32) for n, h in ((T, N), (S, K), (S, K)))
  call = dict(visibility=Visibility(window=options.get("window")), backend="xla", target="h100")
  if "segments" in options:
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (B, T)), axis=1))
    call["segment_ids"] = (ids, ids)
  if "sinks" in options:
    call["sinks"] = jnp.arange(N, dtype=jnp.float32)
  if options.get("position") == "alibi":
    call["alibi_slopes"] = jnp.arange(N) / 4
  if options.get("position") == "relative":
    call["bias"] = jnp.asarray(rng.standard_normal((1, N, T, S)), jnp.float32)
  if "offset" in options:
    call["query_offset"] = jnp.arange(B)
  mesh = make_mesh(MeshConfig(**sizes))

  def loss(q, k, v, attend):
    return (attend(q, k, v, **call) ** 2).sum()

  def on_mesh(q, k, v):
    with activation_sharding(mesh, options.get("rules", RULES)):
      return jax.value_and_grad(loss, (0, 1, 2))(q, k, v, attention)

  want = jax.value_and_grad(loss, (0, 1, 2))(q, k, v, flash_attention)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), jax.jit(on_mesh)(q, k, v), want)
