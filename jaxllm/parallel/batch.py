"""A global batch over hosts: the rows that each one reads, and the arrays that all of them make up.

Which rows a host needs follows from what its devices hold, and from nothing else: devices may stand in the mesh in any
order, and hosts that share a row (a tensor or context axis crosses them) read it each.
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from jaxllm.base.errors import ConfigError


def local_rows(like: PyTree[jax.ShapeDtypeStruct]) -> tuple[int, ...]:
  """The rows of each global batch that this process's devices hold, wholly or in part; ascending.

  Args:
    like: the arrays [B, ...] of a batch, with shardings.

  Raises:
    ConfigError: the mesh does not divide the batch, or this process has no device in it.
  """
  rows: set[int] = set()
  for entry in jax.tree.leaves(like):
    rows |= rows_on(entry, entry.sharding.addressable_devices)
  if not rows:
    raise ConfigError(f"no device of process {jax.process_index()} is in the mesh; every process must take part in it")
  return tuple(sorted(rows))


def rows_on(entry: jax.ShapeDtypeStruct, devices: Collection[jax.Device]) -> set[int]:
  """The rows of an array [B, ...] that these devices hold, wholly or in part.

  Raises:
    ConfigError: the array does not divide over its mesh.
  """
  try:
    indices = entry.sharding.devices_indices_map(entry.shape)
  except ValueError:
    mesh = " x ".join(f"{axis} {size}" for axis, size in entry.sharding.mesh.shape.items() if size > 1)
    raise ConfigError(
      f"a batch of shape {entry.shape} does not divide over the mesh ({mesh}); change training.batch_size, "
      "training.seq_len or mesh.*"
    ) from None
  held = {indices[device][0].indices(entry.shape[0])[:2] for device in devices if device in indices}
  return {row for start, stop in held for row in range(start, stop)}


def put_batch(
  batch: PyTree, like: PyTree[jax.ShapeDtypeStruct], rows: Sequence[int] | None = None
) -> PyTree[jax.Array]:
  """Global arrays, sharded as in `like`, out of the rows that this process has read.

  Each device gets its rows and columns as a view of the host's arrays, which the transfer alone copies (a CPU may
  even keep the view, so the arrays must not be written to afterwards).

  Args:
    batch: numpy arrays [len(rows), ...].
    rows: which rows of the global batch they are, ascending; None: all of them.

  Raises:
    ConfigError: the arrays are not these rows, or a device needs a row that is not among them.
  """

  def put(array: Any, entry: jax.ShapeDtypeStruct) -> jax.Array:
    held = range(entry.shape[0]) if rows is None else rows
    if array.shape != (len(held), *entry.shape[1:]):
      raise ConfigError(f"{len(held)} rows of a batch of shape {entry.shape} cannot have the shape {array.shape}")
    here = lambda index: array[local_index(index, held, entry.shape[0])]  # noqa: E731
    return jax.make_array_from_callback(entry.shape, entry.sharding, here)

  return jax.tree.map(put, batch, like)


def local_index(index: tuple[slice, ...], rows: Sequence[int], batch_size: int) -> tuple[slice, ...]:
  """Where a part of a global array lies in an array of these rows of it.

  A device's rows are consecutive, so they stand together among ascending ones whatever else is between.

  Raises:
    ConfigError: some of them are not there.
  """
  start, stop, _ = index[0].indices(batch_size)
  at = bisect_left(rows, start)
  end = at + stop - start
  if end > len(rows) or (rows[at], rows[end - 1]) != (start, stop - 1):
    raise ConfigError(f"a device needs the rows {start} to {stop - 1} of the batch, which this process has not read")
  return (slice(at, end), *index[1:])
