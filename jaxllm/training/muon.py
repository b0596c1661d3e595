"""Muon: every matrix moves by its momentum, made orthogonal (Jordan 2024, https://kellerjordan.github.io/posts/muon/).

An iteration needs a whole matrix, and under FSDP or tensor parallelism no device holds one. But a stack has many
layers, so the devices exchange once: slices of every matrix for whole matrices of a few layers. They iterate on these
alone and exchange back.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxllm.storage.leaves import leaf_paths

ITERATIONS = 5


def scale_by_muon(beta: float, shardings: PyTree[NamedSharding] | None = None) -> optax.GradientTransformation:
  """The direction of Muon for matrices [..., in, out]; the axes before them count layers and experts.

  Nesterov's momentum with optax's bias corrections, orthogonalised, times sqrt(max(1, out / in)), which keeps
  the update's size per output the same for every shape. Nothing is cast: gradients in float32 are iterated on
  in float32, at the device's default precision of products. (Jordan iterates in bfloat16, which would also
  halve what the devices exchange.)

  Args:
    beta: decay of the momentum.
    shardings: how the parameters lie on a mesh, the same tree; the update may see a part of the tree.
  """
  by_path = {} if shardings is None else leaf_paths(shardings)

  def update(updates, state, params=None):
    del params
    mu = optax.tree.update_moment(updates, state.mu, beta, 1)
    count = optax.safe_increment(state.count)
    ahead = jax.tree.map(
      lambda m, g: beta * m + (1 - beta) * g,
      optax.tree.bias_correction(mu, beta, optax.safe_increment(count)),
      optax.tree.bias_correction(updates, beta, count),
    )
    directions = {
      path: math.sqrt(max(1, x.shape[-1] / x.shape[-2])) * orthogonalize(x, state.ns_coeffs, by_path.get(path))
      for path, x in leaf_paths(ahead).items()
    }
    updates = jax.tree.unflatten(jax.tree.structure(ahead), list(directions.values()))
    return updates, state._replace(count=count, mu=mu)

  # The state is that of optax's Muon: count, mu and the coefficients of the iteration.
  return optax.GradientTransformation(optax.contrib.scale_by_muon().init, update)


def orthogonalize(
  x: Float[Array, "*stack in out"], coefficients: Float[Array, "3"], sharding: NamedSharding | None = None
) -> Float[Array, "*stack in out"]:
  """U V^T, roughly, for every matrix U S V^T of a stack; see `newton_schulz`.

  With a sharding, `x` and the result lie on its mesh so. Where it splits matrices, over k devices, a device
  exchanges its slices for ceil(n / k) of the n matrices that it shares with the others (the last ones may be
  padding) and back: two all-to-alls of its part of the stack. Devices that hold the same slices do the same work.
  """
  if sharding is None or sharding.mesh.size == 1:
    return newton_schulz(x, coefficients)
  mesh, spec = sharding.mesh, sharding.spec
  padded = (*spec, *[None] * (x.ndim - len(spec)))
  row_axes, column_axes = (_mesh_axes(entry, mesh) for entry in padded[-2:])
  rows, columns = (math.prod(mesh.shape[axis] for axis in axes) for axes in (row_axes, column_axes))

  def exchange(x):
    axes = row_axes + column_axes
    return jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True) if axes else x

  def local(x, coefficients):
    *stack, height, width = x.shape
    n = math.prod(stack)
    count = -(-n // (rows * columns))
    slices = jnp.pad(x.reshape(n, height, width), ((0, count * rows * columns - n), (0, 0), (0, 0)))
    pieces = exchange(slices).reshape(rows, columns, count, height, width)
    whole = pieces.transpose(2, 0, 3, 1, 4).reshape(count, rows * height, columns * width)
    whole = newton_schulz(whole, coefficients)
    pieces = whole.reshape(count, rows, height, columns, width).transpose(1, 3, 0, 2, 4)
    slices = exchange(pieces.reshape(count * rows * columns, height, width))
    return slices[:n].reshape(x.shape)

  return jax.shard_map(local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)(x, coefficients)


def newton_schulz(x: Float[Array, "*stack in out"], coefficients: Float[Array, "3"]) -> Float[Array, "*stack in out"]:
  """Five iterations s -> a s + b s^3 + c s^5 on the singular values of every matrix, scaled to norm 1 before.

  Jordan's (a, b, c) lift small values fast and leave all between about 0.7 and 1.2. A matrix of zeros stays.
  """
  a, b, c = coefficients.astype(x.dtype)
  wide = x.shape[-2] <= x.shape[-1]
  x = x if wide else x.mT  # the smaller of the two Gram matrices
  x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)

  def iterate(_, x):
    gram = x @ x.mT
    return a * x + (b * gram + c * gram @ gram) @ x

  x = jax.lax.fori_loop(0, ITERATIONS, iterate, x)
  return x if wide else x.mT


def _mesh_axes(entry: str | tuple[str, ...] | None, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
  """The mesh axes of more than one device that an entry of a PartitionSpec names."""
  axes = (entry,) if isinstance(entry, str) else entry or ()
  return tuple(axis for axis in axes if mesh.shape[axis] > 1)
