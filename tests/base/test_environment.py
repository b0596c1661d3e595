"""Environment variables of a wrong kind are one line that names them."""

import pytest

from jaxllm.base import environment
from jaxllm.base.errors import ConfigError


@pytest.mark.parametrize(
  "name, value",
  [
    *[("JAXLLM_CPU_KERNELS", value) for value in ("yes", "2", "-1", "true", "1e0")],
    *[("JAXLLM_HOST_TIMEOUT_S", value) for value in ("soon", "0", "-1", "nan", "inf", "1e999", "1e6", "0.5")],
    *[("JAXLLM_START_TIMEOUT_S", value) for value in ("x", "1,5")],
  ],
)
def test_ours(monkeypatch, name, value):
  monkeypatch.setenv(name, value)
  with pytest.raises(ConfigError) as error:
    environment.check()
  assert str(error.value).startswith(f"{name} is {value!r}; it must be ")


def test_good_ones_and_none(monkeypatch):
  for name in environment.OURS:
    monkeypatch.delenv(name, raising=False)
  environment.check()
  assert environment.flag("JAXLLM_CPU_KERNELS", True) and environment.seconds("JAXLLM_HOST_TIMEOUT_S", 30.0) == 30
  monkeypatch.setenv("JAXLLM_CPU_KERNELS", " 0 ")
  monkeypatch.setenv("JAXLLM_HOST_TIMEOUT_S", "2.5")
  environment.check()
  assert not environment.flag("JAXLLM_CPU_KERNELS", True)
  assert environment.seconds("JAXLLM_HOST_TIMEOUT_S", 30.0) == 2.5


@pytest.mark.parametrize("value", ["x", "-1", "1.0", "1e3", "٣", "9" * 30, "0x1", "1_0", "²"])
def test_whole_numbers_are_digits(monkeypatch, value):
  monkeypatch.setenv("SLURM_NTASKS", value)
  with pytest.raises(ConfigError, match="SLURM_NTASKS is .*; it must be a whole number"):
    environment.check_cluster()


def test_a_slip_of_the_pen_is_said(monkeypatch, caplog):
  monkeypatch.setenv("JAXLLM_HOST_TIMEOUT", "3")
  environment.check()
  assert [r.getMessage() for r in caplog.records] == [
    "nothing reads JAXLLM_HOST_TIMEOUT; did you mean JAXLLM_HOST_TIMEOUT_S?"
  ]
