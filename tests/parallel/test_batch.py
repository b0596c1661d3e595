"""Which rows a host reads, and the global arrays that come of them, for devices of hosts in any order."""

import dataclasses
import random

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm.base.errors import ConfigError
from jaxllm.parallel.batch import local_index, local_rows, put_batch, rows_on
from jaxllm.parallel.config import AXES, AxisRules, MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.sharding import batch_sharding

RULES = AxisRules()


def like_on(mesh, batch_size, seq_len=16, rules=RULES):
  """A batch's arrays: [B, T], and one number a row [B]."""
  entry = lambda *shape: jax.ShapeDtypeStruct(  # noqa: E731
    shape, np.int32, sharding=batch_sharding(mesh, rules, len(shape))
  )
  return {"inputs": entry(batch_size, seq_len), "targets": entry(batch_size)}


def numbered(like):
  return {name: np.arange(np.prod(x.shape), dtype=np.int32).reshape(x.shape) for name, x in like.items()}


def random_case(seed):
  """A mesh of eight devices in some order, dealt to hosts in some way, and a batch that it divides."""
  draw = random.Random(seed)
  sizes = dict.fromkeys(AXES, 1)
  for _ in range(3):
    sizes[draw.choice(AXES)] *= 2
  devices = draw.sample(jax.devices(), 8)
  mesh = Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))
  count = draw.choice((1, 2, 4, 8))
  hosts = [jax.devices()[i * 8 // count : (i + 1) * 8 // count] for i in range(count)]
  rules = draw.choice((RULES, dataclasses.replace(RULES, batch=("fsdp", "data")), dataclasses.replace(RULES, batch=())))
  return mesh, hosts, like_on(mesh, 8 * draw.randint(1, 3), rules=rules)


@pytest.mark.parametrize("seed", range(40))
def test_hosts_read_all_that_their_devices_hold_and_nothing_else(seed):
  mesh, hosts, like = random_case(seed)
  whole, seen = numbered(like), set()
  for devices in hosts:
    rows = sorted(set().union(*(rows_on(entry, devices) for entry in like.values())))
    seen.update(rows)
    used = set()
    for name, entry in like.items():
      read = whole[name][rows]
      indices = entry.sharding.devices_indices_map(entry.shape)
      for device in devices:
        index = indices[device]
        here = local_index(index, rows, entry.shape[0])
        np.testing.assert_array_equal(read[here], whole[name][index])
        assert np.shares_memory(read[here], read)  # a view, whichever rows they are
        used.update(rows[here[0]])
    assert used == set(rows)
  assert seen == set(range(like["inputs"].shape[0]))


@pytest.mark.parametrize("seed", range(10))
def test_assembled_arrays_are_the_batch(seed):
  _, _, like = random_case(seed)
  whole = numbered(like)
  assert local_rows(like) == tuple(range(like["inputs"].shape[0]))  # one process holds everything
  for rows in (None, local_rows(like)):
    for name, array in put_batch(whole, like, rows).items():
      np.testing.assert_array_equal(array, whole[name])
      assert array.sharding == like[name].sharding


def test_rows_that_are_not_consecutive():
  """Four blocks of two rows; a host with the first and the third reads 0, 1, 4 and 5."""
  devices = jax.devices()[:4]
  like = like_on(make_mesh(MeshConfig(data=4), devices), 8)
  assert rows_on(like["inputs"], (devices[0], devices[2])) == {0, 1, 4, 5}
  assert local_index((slice(4, 6), slice(None)), (0, 1, 4, 5), 8) == (slice(2, 4), slice(None))


def test_a_tensor_or_context_axis_shares_rows():
  for axis in ("tensor", "context"):
    like = like_on(make_mesh(MeshConfig(data=1, **{axis: 8})), 3)
    assert all(rows_on(entry, [device]) == {0, 1, 2} for device in jax.devices() for entry in like.values())


def test_errors_are_one_line():
  like = like_on(make_mesh(MeshConfig(data=4, tensor=2)), 8)
  uneven = like_on(make_mesh(MeshConfig(data=4, tensor=2)), 6)
  with pytest.raises(ConfigError, match=r"batch of shape \(6, 16\) does not divide over the mesh \(data 4 x ten"):
    local_rows(uneven)
  whole = numbered(like)
  with pytest.raises(ConfigError, match=r"6 rows of a batch of shape \(8, 16\) cannot have the shape \(8, 16\)"):
    put_batch(whole, like, range(6))
  with pytest.raises(ConfigError, match="a device needs the rows 6 to 7 of the batch, which this process has not read"):
    put_batch({name: array[:6] for name, array in whole.items()}, like, range(6))
  with pytest.raises(ConfigError, match="needs the rows 2 to 3"):
    put_batch({name: array[[0, 1, 2, 4, 5, 6, 7]] for name, array in whole.items()}, like, (0, 1, 2, 4, 5, 6, 7))


def test_a_process_without_a_device_of_the_mesh(monkeypatch):
  like = like_on(make_mesh(MeshConfig(data=2)), 8)
  monkeypatch.setattr(NamedSharding, "addressable_devices", property(lambda self: set()))
  with pytest.raises(ConfigError, match="no device of process 0 is in the mesh"):
    local_rows(like)


def test_a_replicated_batch_is_read_whole():
  sharding = NamedSharding(make_mesh(MeshConfig(data=8)), PartitionSpec())
  assert local_rows({"inputs": jax.ShapeDtypeStruct((5, 3), np.int32, sharding=sharding)}) == (0, 1, 2, 3, 4)
