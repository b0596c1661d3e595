"""The chip table against device names, and what follows from a name."""

import pytest

from jaxllm.base.chips import CHIPS, TARGETS, chip_of


@pytest.mark.parametrize(
  "kind, name",
  [
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H100 PCIe", "h100_pcie"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA B200", "b200"),
    ("NVIDIA GeForce RTX 4090", "gpu"),
  ],
)
def test_gpus(kind, name):
  assert chip_of("cuda", kind) is chip_of("gpu", kind) is CHIPS[name]


@pytest.mark.parametrize(
  "kind, name",
  [
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5e", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("TPU v6e", "v6e"),
    ("TPU7x", "v7"),
    ("TPU v4 lite", "v4i"),
    ("TPU v3", "tpu"),
  ],
)
def test_tpus(kind, name):
  assert chip_of("tpu", kind) is CHIPS[name]


@pytest.mark.parametrize("name", ["cpu", "gpu", "tpu", "v4i"])
def test_no_peak_is_made_up(name):
  assert CHIPS[name].flops is None
  assert chip_of("cpu", "cpu") is CHIPS["cpu"]


def test_memory_feeds_the_matrix_units_as_data_sheets_say():
  """FLOPs per byte lie between 100 and 600 on every chip: a figure in the wrong unit does not."""
  for chip in CHIPS.values():
    assert TARGETS[chip.name] == chip.family
    if chip.flops:
      assert 100 < chip.flops / chip.bandwidth < 600, chip
