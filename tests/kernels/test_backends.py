"""The table of backends: what a call gets when it says little, and when it asks for what cannot be."""

import logging

import jax.numpy as jnp
import pytest

from jaxllm.errors import ConfigError
from jaxllm.kernels import backends, flash_attention


def refuses_first(backend, target):
  return "too long" if backend == backends.BACKENDS["attention"][backends.TARGETS[target]][0] else None


@pytest.fixture
def said(caplog, monkeypatch):
  """What was logged, with nothing said before."""
  monkeypatch.setattr(backends, "_logged", {})
  monkeypatch.setattr(logging.getLogger("jaxllm"), "propagate", True)
  caplog.set_level(logging.INFO, "jaxllm")
  return caplog


def test_a_target_alone_asks_the_table(said):
  assert backends.choose("attention", None, "h100", lambda *_: None) == "cudnn"
  assert backends.choose("attention", None, None) == "xla"
  assert "neither backend= nor target=" in said.text


def test_what_was_passed_over_is_a_warning_and_said_once(said):
  for _ in range(2):
    assert backends.choose("attention", "auto", "h100", refuses_first) in ("mosaic_gpu", "xla")
  (record,) = said.records
  assert record.levelno == logging.WARNING and "cudnn: too long" in record.message


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(backend="auto"), "needs target="),
    (dict(backend="triton"), "no backend 'triton'"),
    (dict(backend="pallas_tpu", target="h100"), "no backend 'pallas_tpu' on h100"),
    (dict(target="h1000"), "unknown target 'h1000'"),
  ],
)
def test_what_cannot_be_is_one_line(arguments, message):
  x = jnp.zeros((1, 8, 1, 64))
  with pytest.raises(ConfigError, match=message):
    flash_attention(x, x, x, **arguments)
