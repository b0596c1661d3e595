"""The environment variables that this program reads, with their types: the one place that reads them.

A value of another kind is one line that names the variable, as it is for a key of the config.
"""

import difflib
import logging
import os

from jaxllm.base.errors import ConfigError

# Ours. A name that begins like these and is none of them is a slip of the pen, which is said.
OURS = ("JAXLLM_CACHE_DIR", "JAXLLM_CPU_KERNELS", "JAXLLM_START_TIMEOUT_S", "JAXLLM_HOST_TIMEOUT_S")
# What jax reads of clusters, as whole numbers, without saying which one is none.
OF_CLUSTERS = (
  *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "JOB_COMPLETION_INDEX"),
  *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
)

log = logging.getLogger("jaxllm")


def text(name: str) -> str:
  """The variable without blanks at its ends; "" where it is not set."""
  return os.environ.get(name, "").strip()


def flag(name: str, default: bool) -> bool:
  """Whether the variable is 1 or 0.

  Raises:
    ConfigError: it is something else.
  """
  value = text(name)
  if value not in ("", "0", "1"):
    raise ConfigError(f"{name} is {value!r}; it must be 0 or 1")
  return default if not value else value == "1"


def whole(name: str, lowest: int = 0, highest: int = 2**31 - 1) -> int | None:
  """The variable as a whole number, None where it is not set.

  Raises:
    ConfigError: it is none, or not from `lowest` to `highest`.
  """
  value = text(name)
  if not value:
    return None
  number = int(value) if value.isascii() and value.isdecimal() and len(value) < 20 else -1
  if not lowest <= number <= highest:
    span = f"from {lowest} to {highest}" if highest < 2**31 - 1 else f"of at least {lowest}" if lowest else ""
    raise ConfigError(f"{name} is {value!r}; it must be a whole number{' ' + span if span else ''}")
  return number


def seconds(name: str, default: float) -> float:
  """The variable as seconds, at least one.

  Raises:
    ConfigError: it is no such number.
  """
  value = text(name) or str(default)
  try:
    number = float(value)
  except ValueError:
    number = 0.0
  if not 1 <= number < 1e6:
    raise ConfigError(f"{name} is {value!r}; it must be a number of seconds, at least 1")
  return number


def check() -> None:
  """Reads what there is of ours, so that a wrong value is told at once, and warns of names that nothing reads.

  Raises:
    ConfigError: see `flag`, `whole` and `seconds`.
  """
  flag("JAXLLM_CPU_KERNELS", True)
  seconds("JAXLLM_START_TIMEOUT_S", 300.0)
  seconds("JAXLLM_HOST_TIMEOUT_S", 30.0)
  for name in sorted(os.environ):
    if name.startswith("JAXLLM_") and name not in OURS:
      near = difflib.get_close_matches(name, OURS, n=1)
      log.warning("nothing reads %s%s", name, f"; did you mean {near[0]}?" if near else f"; known: {', '.join(OURS)}")


def check_cluster() -> None:
  """The same of what jax reads of clusters."""
  for name in OF_CLUSTERS:
    whole(name)
