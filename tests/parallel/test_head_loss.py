"""The head's loss on a mesh: one device's numbers, and no collective that the mesh does not promise."""

import functools
import importlib.util
import logging
import sys
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxllm.kernels import cross_entropy
from jaxllm.parallel import head_loss
from jaxllm.parallel.config import AxisRules, MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.sharding import activation_sharding, partition_spec

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import hlo

RULES = AxisRules()
B, T, D, V = 8, 16, 16, 48
MESHES = [
  dict(data=8),
  dict(data=1, fsdp=8),
  dict(data=1, expert=8),
  dict(data=1, context=8),
  dict(data=1, tensor=8),
  dict(data=2, fsdp=2, tensor=2),
  dict(data=1, fsdp=2, context=2, tensor=2),
  dict(data=2, expert=2, context=2),
  dict(data=1, fsdp=4, tensor=2),
]
# What the head's loss sends along an axis of the mesh, and nothing else. Everywhere the four sums, and the gradient of
# the head: reduced into its shards where the axis splits it, else whole.
PROMISE = {
  "data": {"all-reduce"},
  "expert": {"all-reduce"},
  "context": {"all-reduce"},
  "fsdp": {"all-reduce", "all-gather", "reduce-scatter"},  # the head's rows are gathered
  "tensor": {"all-reduce", "all-gather", "reduce-scatter"},  # its columns, and the gradient of x along positions
}


def draw(B=B, T=T, *, transposed=False, dtype=jnp.float32, head_dtype=jnp.float32):
  """(x, head, bias), targets, weights."""
  rng = np.random.default_rng(0)
  x, bias = jnp.asarray(rng.standard_normal((B, T, D)), dtype), jnp.asarray(rng.standard_normal(V), head_dtype)
  head = jnp.asarray(rng.standard_normal((V, D) if transposed else (D, V)) / 2, head_dtype)
  targets, weights = rng.integers(0, V, (B, T)), rng.integers(0, 3, (B, T))
  return (x, head, bias), jnp.asarray(targets), jnp.asarray(weights, jnp.float32)


def on_mesh(function, sizes, arrays, transposed=False):
  """(results of function(x, head, bias) with its arguments where training has them, the collectives)."""
  mesh = make_mesh(MeshConfig(**sizes))
  axes = ("batch", "seq", None), (("vocab", "embed") if transposed else ("embed", "vocab")), ("vocab",)
  shardings = tuple(NamedSharding(mesh, partition_spec(names, RULES)) for names in axes)

  def run(*arrays):
    with activation_sharding(mesh, RULES):
      value, gradients = function(*arrays)
    return value, tuple(map(jax.lax.with_sharding_constraint, gradients, shardings))

  compiled = jax.jit(run, in_shardings=shardings).lower(*arrays).compile()
  return compiled(*jax.device_put(arrays, shardings)), hlo.collectives(compiled.as_text(), mesh)


def loss_and_gradients(targets, weights, target="cpu", **options):
  """function(x, head, bias) -> ((sums), gradients)."""

  def loss(x, head, bias):
    sums = head_loss.cross_entropy(x, head, targets, weights, bias=bias, target=target, **options)
    return 0.5 * sums.loss_sum, sums

  def run(*arrays):
    (_, sums), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arrays)
    return sums, gradients

  return run


def close(got, want, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_one_devices_numbers_and_no_collective_in_the_loop(sizes, transposed):
  arrays, targets, weights = draw(transposed=transposed)
  options = dict(backend="xla", chunk=4, z_loss=1e-2, transposed=transposed)
  run = loss_and_gradients(targets, weights, **options)
  got, found = on_mesh(run, sizes, arrays, transposed)
  close(got, run(*arrays))
  assert found and all(one.loops == () for one in found)  # a device has 16 tokens: four chunks
  split = {axis for axis, size in sizes.items() if size > 1}
  for one in found:
    assert one.axes and all(one.kind in PROMISE[axis] and axis in split for axis in one.axes), one
  shards = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
  sent = {kind: sum(one.bytes for one in found if one.kind == kind) for kind in hlo.KINDS}
  # In bytes: the head and the bias are gathered once, along one axis after the other, and so is x's gradient.
  head = 4 * V * (D + 1)
  rows = sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("expert", 1) * sizes.get("context", 1)
  gathered_x = 4 * B * T * D // rows if sizes.get("tensor", 1) > 1 else 0
  assert sent["all-gather"] <= (2 * head if shards > 1 else 0) + gathered_x
  assert sent["reduce-scatter"] <= (2 * head if shards > 1 else 0)
  assert sent["all-reduce"] <= head + 16


def test_the_loop_is_there():
  """Without shards the same loss has collectives in its loop: so the test above can fail."""
  arrays, targets, weights = draw()

  def loss(x, head, bias):
    return cross_entropy(x, head, targets, weights, chunk=4, backend="xla").loss_sum

  _, found = on_mesh(jax.value_and_grad(loss, (0, 1, 2)), dict(data=1, fsdp=8), arrays)
  assert any(one.loops == ("head loss",) and one.times == B * T // 4 for one in found)


@pytest.mark.parametrize("backend, target", [("auto", "cpu"), ("cpu", "cpu"), ("auto", "h100"), ("xla", "v5p")])
def test_every_backend_goes_by_shards(backend, target):
  """The CPU's own kernel too, which the compiler cannot split."""
  arrays, targets, weights = draw()
  run = loss_and_gradients(targets, weights, backend=backend, target=target, label_smoothing=0.1)
  got, found = on_mesh(run, dict(data=4, fsdp=2), arrays)
  close(got, run(*arrays))
  assert sum(one.bytes for one in found if one.kind == "all-gather") == 4 * V * D  # the head, and no tokens


@pytest.mark.parametrize("sizes", [MESHES[1], MESHES[4], MESHES[5]], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_token_log_probs(sizes, transposed):
  arrays, targets, weights = draw(transposed=transposed)
  of_logp, of_lse = np.random.default_rng(1).standard_normal((2, B, T)).astype(np.float32)

  def run(*arrays):
    def total(x, head, bias):
      options = dict(bias=bias, mask=weights != 0, transposed=transposed, target="cpu")
      logp, lse = head_loss.token_log_probs(x, head, targets, backend="xla", chunk=4, softcap=5.0, **options)
      return (of_logp * logp + of_lse * lse).sum(), (logp, lse)

    (_, each), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*arrays)
    return each, gradients

  got, found = on_mesh(run, sizes, arrays, transposed)
  close(got, run(*arrays))
  assert not any("head loss" in one.loops for one in found)


@pytest.mark.parametrize("rows, positions", [(3, 16), (8, 7), (3, 7)])
@pytest.mark.parametrize("sizes", [dict(data=2, tensor=4), dict(data=1, fsdp=2, context=2, tensor=2)], ids=str)
def test_what_the_mesh_does_not_divide(rows, positions, sizes, caplog):
  arrays, targets, weights = draw(rows, positions)
  run = loss_and_gradients(targets, weights, backend="xla", chunk=4)
  mesh = make_mesh(MeshConfig(**sizes))

  @jax.jit
  def whole(*arrays):
    with activation_sharding(mesh, RULES):
      return run(*arrays)

  head_loss._say_repeated.cache_clear()
  with caplog.at_level(logging.WARNING, "jaxllm"):
    close(whole(*arrays), run(*arrays))
  assert (f"{rows} rows of {positions} positions do not divide" in caplog.text) == (positions == 7)


@pytest.mark.parametrize("mesh", [None, dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_a_16_bit_heads_gradient_over_hundreds_of_chunks(mesh):
  """Against float64. One word is the target of every second token: its gradient is a sum of like numbers."""
  rng = np.random.default_rng(0)
  rows, positions = 8, 1024
  x = jnp.asarray(rng.standard_normal((rows, positions, D)) + 1, jnp.bfloat16)
  head = jnp.asarray(rng.standard_normal((D, V)) / 8, jnp.bfloat16)
  targets = np.where(rng.random((rows, positions)) < 0.5, 0, rng.integers(0, V, (rows, positions)))
  weights = jnp.ones((rows, positions))

  def loss(x, head):
    options = dict(backend="xla", chunk=8 if mesh is None else 4, target="cpu")
    return head_loss.cross_entropy(x, head, jnp.asarray(targets), weights, **options).loss_sum

  def gradient(x, head):
    if mesh is None:
      return jax.grad(loss, 1)(x, head)
    with activation_sharding(make_mesh(MeshConfig(**mesh)), RULES):
      return jax.grad(loss, 1)(x, head)

  got = np.asarray(jax.jit(gradient)(x, head), np.float64)
  flat, w = np.asarray(x, np.float64).reshape(-1, D), np.asarray(head, np.float64)
  z = flat @ w
  p = np.exp(z - z.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  p[np.arange(len(p)), targets.reshape(-1)] -= 1
  want = flat.T @ p
  assert np.linalg.norm(got - want) < 0.01 * np.linalg.norm(want)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu")
@pytest.mark.parametrize("sizes", [dict(data=8), dict(data=1, fsdp=8), dict(data=1, fsdp=2, tensor=4)], ids=str)
def test_compiled_for_a_tpu(sizes):
  from jaxllm.parallel.topologies import tpu_mesh

  mesh = make_mesh(MeshConfig(**sizes), list(tpu_mesh("v5e:2x4").devices.flat))
  axes = ("batch", "seq", None), ("embed", "vocab"), ("vocab",), ("batch", "seq"), ("batch", "seq")
  shardings = [NamedSharding(mesh, partition_spec(names, RULES)) for names in axes]
  shapes = (8, 256, 512), (512, 4096), (4096,), (8, 256), (8, 256)
  dtypes = (jnp.bfloat16,) * 3 + (jnp.int32, jnp.float32)
  avals = [jax.ShapeDtypeStruct(*a, sharding=s) for *a, s in zip(shapes, dtypes, shardings)]

  def step(x, head, bias, targets, weights):
    run = loss_and_gradients(targets, weights, backend="xla", chunk=64)
    with activation_sharding(mesh, RULES):
      return run(x, head, bias)[1]

  compiled = (
    jax.jit(step, out_shardings=tuple(shardings[:3])).trace(*avals).lower(lowering_platforms=("tpu",)).compile()
  )
  text = compiled.as_text()
  found = hlo.collectives(text, mesh)
  assert " while(" in text and found and all(one.loops == () for one in found)
  for one in found:
    assert all(one.kind in PROMISE[axis] for axis in one.axes), one


def made(jaxpr):
  """The shapes of all that a jaxpr computes, inside its loops and shards too."""
  for equation in jaxpr.eqns:
    yield from (var.aval.shape for var in equation.outvars if equation.primitive.name in ("dot_general", "ffi_call"))
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from made(inner)


@pytest.mark.parametrize("sizes", [None, dict(fsdp=4, tensor=2)], ids=["one device", "mesh"])
def test_under_a_frozen_head_the_logits_are_computed_once(sizes):
  """Of log-probabilities alone, which preference losses are made of; the gradient is that of any other head."""
  (x, head, bias), targets, weights = draw()

  def loss(x, head, bias):
    options = dict(bias=bias, mask=weights != 0, backend="xla", target="cpu")
    logp = head_loss.token_log_probs(x, head, targets, **options)[0]
    return (weights * logp).sum() ** 2 / 100

  def within(x, head, bias, asked):
    if sizes is None:
      return jax.grad(loss, asked)(x, head, bias)
    with activation_sharding(make_mesh(MeshConfig(**sizes)), RULES):
      return jax.grad(loss, asked)(x, head, bias)

  products = {}
  for asked in (0, (0, 1)):
    run = functools.partial(within, asked=asked)
    text = str(jax.make_jaxpr(run)(x, head, bias))
    products[asked] = text.count("dot_general[")
  assert products == {0: 2, (0, 1): 4}  # logits and dx; logits twice, dx and the head's
  close(jax.jit(functools.partial(within, asked=0))(x, head, bias), jax.grad(loss)(x, head, bias))
  close(jax.jit(functools.partial(within, asked=(0, 1)))(x, head, bias)[0], jax.grad(loss)(x, head, bias))


@pytest.mark.parametrize("sizes", [None, dict(fsdp=4, tensor=2)], ids=["one device", "mesh"])
@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_a_frozen_heads_gradient_is_not_computed(sizes, backend):
  """Of the sum and of each token: the other gradients are the same, and nothing of the head's shape is multiplied."""
  (x, head, bias), targets, weights = draw()

  def of_sum(x, head, bias):
    return head_loss.cross_entropy(x, head, targets, weights, bias=bias, backend=backend, target="cpu").loss_sum

  def of_tokens(x, head, bias):
    logp, lse = head_loss.token_log_probs(x, head, targets, bias=bias, backend=backend, target="cpu")
    return (logp * weights).sum() + (lse**2).sum()

  def within(function):
    if sizes is None:
      return function
    mesh = make_mesh(MeshConfig(**sizes))

    def run(*arrays):
      with activation_sharding(mesh, RULES):
        return function(*arrays)

    return run

  for loss in (of_sum, of_tokens):
    shapes = {}
    gradients = {}
    for asked in ((0, 1, 2), (0,), (0, 2), (2,)):
      run = jax.jit(within(jax.grad(loss, asked)))
      gradients[asked] = dict(zip(asked, run(x, head, bias), strict=True))
      shapes[asked] = set(made(jax.make_jaxpr(run)(x, head, bias).jaxpr))
    for got in gradients.values():
      for argument, gradient in got.items():
        close(gradient, gradients[0, 1, 2][argument], 1e-6)
    of_head = (D + 1, V)  # the bias is one more row
    assert of_head in shapes[0, 1, 2] and of_head not in shapes[(0,)]
