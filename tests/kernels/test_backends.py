"""The table of backends: what a call gets when it says little, and when it asks for what cannot be."""

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import backends, flash_attention

UNMEASURED = "not measured on this chip"


@pytest.fixture
def said(caplog, monkeypatch):
  """What was logged, with nothing said before."""
  monkeypatch.setattr(backends, "_logged", {})
  monkeypatch.setattr(logging.getLogger("jaxllm"), "propagate", True)
  caplog.set_level(logging.INFO, "jaxllm")
  return caplog


@pytest.fixture
def table(monkeypatch):
  """One op with a kernel of ours before, between and behind others; of any age of jax."""
  rows = {
    "hopper": ("mosaic_gpu", "cudnn", "xla"),
    "tpu": ("pallas_tpu", "xla"),
    "cpu": ("cpu", "xla"),
    "gpu": ("xla",),
  }
  monkeypatch.setitem(backends.BACKENDS, "op", rows)
  monkeypatch.setitem(backends.BACKENDS, "behind", {"hopper": ("xla", "mosaic_gpu")})
  monkeypatch.setattr(backends, "LEAST_JAX", {})
  monkeypatch.setattr(backends, "MEASURED", {("op", "mosaic_gpu"): {"h200": "record.json"}})


# (requested, target, refused, quadratic) -> (backend, what is said)
RULE = [
  # Measured on that chip, and not only on a sister.
  (("auto", "h200", (), ()), ("mosaic_gpu", "")),
  (("auto", "h100", (), ()), ("cudnn", f"mosaic_gpu: {UNMEASURED}")),
  (("auto", "h100", ("cudnn",), ()), ("xla", f"mosaic_gpu: {UNMEASURED}; cudnn: cannot")),
  (("auto", "v5p", (), ()), ("xla", f"pallas_tpu: {UNMEASURED}")),
  (("auto", "cpu", (), ()), ("cpu", "")),
  # A backend that is quadratic in memory comes behind one that is not, measured or not.
  (("auto", "h100", (), ("cudnn",)), ("xla", f"mosaic_gpu: {UNMEASURED}; cudnn: large")),
  (("auto", "h100", (), ("cudnn", "xla")), ("mosaic_gpu", UNMEASURED)),
  (("auto", "v5p", (), ("xla",)), ("pallas_tpu", UNMEASURED)),
  (("auto", "h200", (), ("mosaic_gpu",)), ("cudnn", "mosaic_gpu: large")),
  # Unless it is all there is.
  (("auto", "h100", ("mosaic_gpu", "xla"), ("cudnn",)), ("cudnn", "large; mosaic_gpu: cannot")),
  (("auto", "v5p", ("pallas_tpu",), ("xla",)), ("xla", "large; pallas_tpu: cannot")),
  # In one word: ours where it can compute the call, else as "auto", with the reason.
  (("pallas", "h200", (), ()), ("mosaic_gpu", "")),
  (("pallas", "h100", (), ()), ("mosaic_gpu", UNMEASURED)),
  (("pallas", "h100", ("mosaic_gpu",), ()), ("cudnn", "mosaic_gpu: cannot")),
  (("pallas", "v5p", (), ()), ("pallas_tpu", UNMEASURED)),
  # By name: it and no other.
  (("mosaic_gpu", "h200", (), ()), ("mosaic_gpu", "")),
  (("mosaic_gpu", "h100", (), ()), ("mosaic_gpu", UNMEASURED)),
  (("xla", "h100", (), ("xla",)), ("xla", "")),
]


@pytest.mark.parametrize("call, want", RULE, ids=[str(call) for call, _ in RULE])
def test_the_rule(call, want, table, said):
  requested, target, refused, large = call
  refuses = lambda backend, _: "cannot" if backend in refused else None  # noqa: E731
  quadratic = lambda backend: "large" if backend in large else None  # noqa: E731
  for _ in range(2):
    assert backends.choose("op", requested, target, refuses, quadratic) == want[0]
  (record,) = said.records  # said once
  assert record.message == f"op on {target}: {want[0]}" + (f" ({want[1]})" if want[1] else "")
  assert record.levelno == (logging.WARNING if want[1] else logging.INFO)
  assert backends.chosen("op", target) == {want[0]: want[1]}


def test_a_kernel_of_ours_behind_others_is_found_by_the_word(table):
  assert backends.choose("behind", "pallas", "h100") == "mosaic_gpu"
  assert backends.choose("behind", "auto", "h100") == "xla"


def test_where_nothing_can_all_reasons_are_given(table):
  with pytest.raises(ConfigError, match="no backend can, mosaic_gpu: cannot; cudnn: cannot; xla: cannot"):
    backends.choose("op", "auto", "h100", lambda *_: "cannot")


def test_by_name_raises_with_the_reason(table):
  with pytest.raises(ConfigError, match="'cudnn' cannot compute this call: too long"):
    backends.choose("op", "cudnn", "h100", lambda *_: "too long")


def test_a_target_alone_asks_the_table(said):
  assert backends.choose("attention", None, "h100", lambda *_: None) == "cudnn"
  assert backends.choose("attention", None, None) == "xla"
  assert "neither backend= nor target=" in said.text


@pytest.mark.parametrize("op", backends.BACKENDS)
@pytest.mark.parametrize("target", backends.TARGETS)
def test_nothing_unmeasured_is_taken_unasked(op, target):
  """Everything in the table that takes a call whatever it is: no row needs what never ran."""
  backend = backends.choose(op, "auto", target, lambda *_: None)
  assert backend not in backends.UNPROVEN or target in backends.MEASURED[op, backend]


def test_every_measurement_is_on_record():
  root = Path(__file__).parents[2]
  for (op, backend), chips in backends.MEASURED.items():
    for chip, record in chips.items():
      assert backend in backends.BACKENDS[op][backends.TARGETS[chip]]
      assert json.loads((root / record).read_text())["target"] == chip


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(backend="auto"), "needs target="),
    (dict(backend="pallas"), "needs target="),
    (dict(backend="triton"), "no backend 'triton'"),
    (dict(backend="pallas_tpu", target="h100"), "no backend 'pallas_tpu' on h100"),
    (dict(target="h1000"), "unknown target 'h1000'"),
  ],
)
def test_what_cannot_be_is_one_line(arguments, message):
  x = jnp.zeros((1, 8, 1, 64))
  with pytest.raises(ConfigError, match=message):
    flash_attention(x, x, x, **arguments)


@pytest.mark.parametrize("target", ["cpu", "a100", "gpu"])
def test_the_word_means_nothing_where_there_is_no_kernel(target):
  with pytest.raises(ConfigError, match=f"h100, h200, .*v5p, .*, not for {target}"):
    backends.check_pallas(target)


def test_the_word_means_nothing_to_a_jax_that_is_too_old(monkeypatch):
  monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
  with pytest.raises(ConfigError, match="needs jax 0.11, this is"):
    backends.check_pallas("h100")
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
  backends.check_pallas("h100")


def test_a_least_version_counts_its_last_number(monkeypatch):
  for version, old in (((0, 11, 1), True), ((0, 11, 2), False), ((0, 12, 0), False)):
    monkeypatch.setattr(jax, "__version_info__", version)
    assert bool(backends._too_old("cudnn_packed")) == old
