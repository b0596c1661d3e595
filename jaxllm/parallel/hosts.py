"""Starting a job on several hosts."""

import os

import jax

from jaxllm.errors import ConfigError


def join_hosts() -> None:
  """Connects this process to the job's other processes, if there are any; call before anything uses a device.

  A TPU pod, SLURM and Kubernetes with JobSet are recognised by JAX itself. Elsewhere every process gets
  JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  Raises:
    ConfigError: the three variables are incomplete.
  """
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  given = {name: os.environ[name] for name in names if os.environ.get(name)}
  if given:
    if missing := [name for name in names if name not in given]:
      raise ConfigError(f"{names[0]}, {names[1]} and {names[2]} go together; {', '.join(missing)} is not set")
    address, count, index = given.values()
    jax.distributed.initialize(address, int(count), int(index))
    return
  pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
  slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
  if pod or slurm or os.environ.get("JOBSET_NAME"):
    jax.distributed.initialize()
