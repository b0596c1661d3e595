"""Where the devices of a mesh stand: neighbours on inner axes have the fastest links between them."""

import dataclasses
import importlib.util
import logging

import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a layout can see of a device."""

  id: int
  process_index: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v6 lite"
  coords: tuple[int, ...] = (0, 0, 0)
  core_on_chip: int = 0
  slice_index: int | None = None


def tpu(shape, kind, slices=1):
  """Chips of one or more tori; a host has 2 x 2 of them."""
  chips = []
  for s in range(slices):
    for place in np.ndindex(*shape[::-1]):
      x, y, z = place[::-1]
      host = (s * shape[2] + z) * (shape[0] * shape[1] // 4) + (y // 2) * (shape[0] // 2) + x // 2
      chips.append(Chip(len(chips), host, "tpu", kind, (x, y, z), 0, s if slices > 1 else None))
  return chips


def gpus(hosts, each, slice_index=True):
  return [
    Chip(i, i // each, "gpu", "NVIDIA H100 80GB HBM3", (), 0, i // each if slice_index else None)
    for i in range(hosts * each)
  ]


@pytest.fixture
def layout(monkeypatch):
  """`make_mesh`, without the class that insists on real devices."""
  monkeypatch.setattr("jaxllm.parallel.mesh.Mesh", lambda grid, axes, axis_types: grid)
  return lambda devices, **sizes: make_mesh(MeshConfig(**{"data": 1} | sizes), devices)


def lines(grid, axis):
  """The devices along one axis, one line for every place on the others."""
  return np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])


def hops(line, torus):
  """Distances on the torus between neighbours of a line that closes to a ring."""
  for a, b in zip(line, np.roll(line, -1)):
    steps = [abs(p - q) for p, q in zip(a.coords, b.coords)]
    yield sum(min(step, size - step) for step, size in zip(steps, torus))


DATA, STAGE, FSDP, EXPERT, CONTEXT, TENSOR = range(6)


def test_axes_that_share_an_axis_of_the_torus(layout, caplog):
  """8 x 8 chips as 16 x 4: neither size is a product of whole sides."""
  with caplog.at_level(logging.INFO, "jaxllm"):
    grid = layout(tpu((8, 8, 1), "TPU v6 lite"), fsdp=16, tensor=4)
  assert grid.shape == (1, 1, 16, 1, 1, 4)
  assert len({chip.id for chip in grid.flat}) == 64
  assert "fsdp 16 x tensor 4 do not fit whole axes of the torus" in caplog.text
  for line in lines(grid, TENSOR):  # four chips in a row or in a square, not scattered
    assert max(list(hops(line, (8, 8, 1)))[:-1]) <= 2


def test_axes_that_fit_take_whole_axes_of_the_torus(layout, caplog):
  with caplog.at_level(logging.INFO, "jaxllm"):
    grid = layout(tpu((4, 4, 2), "TPU v5"), fsdp=8, tensor=4)
  assert grid.shape == (1, 1, 8, 1, 1, 4)
  assert not caplog.records
  for line in lines(grid, TENSOR):
    assert set(hops(line, (4, 4, 2))) == {1}


@pytest.mark.parametrize(
  "sizes, crossing",
  [(dict(data=2, fsdp=16, tensor=4), DATA), (dict(fsdp=32, tensor=4), FSDP), (dict(data=4, fsdp=8, tensor=4), DATA)],
  ids=str,
)
def test_the_outermost_axis_crosses_slices(layout, sizes, crossing, caplog):
  with caplog.at_level(logging.INFO, "jaxllm"):
    grid = layout(tpu((8, 8, 1), "TPU v6 lite", slices=2), **sizes)
  assert len({chip.id for chip in grid.flat}) == 128
  for axis in range(6):
    slices = {len({chip.slice_index for chip in line}) for line in lines(grid, axis)}
    assert slices == ({2} if axis == crossing else {1})
  assert "2 across 2 slices" in caplog.text
  # the slower half of the axis is the one that crosses: each slice's devices stand together
  assert [chip.slice_index for chip in lines(grid, crossing)[0]] == sorted(
    chip.slice_index for chip in lines(grid, crossing)[0]
  )


def test_two_axes_cross_four_slices(layout):
  grid = layout(tpu((4, 4, 1), "TPU v6 lite", slices=4), data=2, fsdp=8, tensor=4)
  assert all(len({chip.slice_index for chip in line}) == 2 for axis in (DATA, FSDP) for line in lines(grid, axis))
  assert all(len({chip.slice_index for chip in line}) == 1 for line in lines(grid, TENSOR))


def test_an_inner_axis_does_not_cross_slices(layout):
  with pytest.raises(ConfigError, match=r"mesh\.tensor would cross the 2 slices.* mesh\.data or .* that 2 divides$"):
    layout(tpu((4, 2, 1), "TPU v6 lite", slices=2), tensor=16)


def test_slices_of_different_sizes(layout):
  chips = tpu((4, 4, 1), "TPU v6 lite", slices=2)[:24]
  with pytest.raises(ConfigError, match="the slices have 16, 8 devices; a mesh needs equally many"):
    layout(chips, data=2, fsdp=12)


def test_what_jax_cannot_lay_out_is_one_line(layout):
  chips = tpu((4, 4, 1), "TPU v6 lite")
  holed = [*chips[:12], *tpu((4, 5, 1), "TPU v6 lite")[16:]]
  with pytest.raises(ConfigError, match=r"the mesh \(fsdp 16\) cannot be laid out on these 16 TPU v6 lite") as caught:
    layout(holed, fsdp=16)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("slice_index", [True, False])
@pytest.mark.parametrize(
  "sizes", [dict(data=4, tensor=8), dict(data=2, fsdp=8, tensor=2), dict(fsdp=8, context=2, tensor=2)], ids=str
)
def test_inner_axes_stay_within_a_host_of_gpus(layout, sizes, slice_index):
  """In whatever order the devices come."""
  devices = gpus(4, 8, slice_index)
  np.random.default_rng(0).shuffle(devices)
  grid = layout(devices, **sizes)
  assert len({chip.id for chip in grid.flat}) == 32
  inner = grid.reshape(4, 8)
  assert all(len({chip.process_index for chip in host}) == 1 for host in inner)


def test_a_tensor_axis_over_hosts_of_gpus_is_possible_and_said(layout, caplog):
  grid = layout(gpus(2, 8), tensor=16)
  assert [chip.id for chip in grid.flat] == list(range(16))
  assert "mesh.tensor crosses hosts" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu describes the topologies")
@pytest.mark.parametrize(
  "topology, slices, sizes",
  [
    ("v6e:8x8", 1, dict(fsdp=16, tensor=4)),
    ("v5p:4x4x2", 1, dict(fsdp=8, tensor=4)),
    ("v6e:4x4", 2, dict(data=2, fsdp=4, tensor=4)),
  ],
)
def test_meshes_of_real_topologies(topology, slices, sizes):
  """The made-up chips above have what libtpu's have."""
  from jaxllm.parallel.topologies import tpu_devices

  mesh = make_mesh(MeshConfig(**{"data": 1} | sizes), tpu_devices(topology, slices))
  assert {axis: size for axis, size in mesh.shape.items() if size > 1} == sizes
  for axis in (FSDP, TENSOR):
    assert all(len({getattr(d, "slice_index", 0) for d in line}) == 1 for line in lines(mesh.devices, axis))
