"""Starting a job on several hosts, and leaving it.

Settings, as environment variables:
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID: where nothing else says who belongs to the job;
    JAX_NUM_PROCESSES=1 alone keeps a process by itself, whatever cluster it runs on.
  JAXLLM_START_TIMEOUT_S (300): how long a process waits for the others at the start.
  JAXLLM_HOST_TIMEOUT_S (30): how long a process may be silent before the others end, see `watch`.
"""

import atexit
import contextlib
import dataclasses
import errno
import functools
import logging
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

from jaxllm.base import environment
from jaxllm.base.errors import ConfigError, UserError
from jaxllm.parallel.watch import AGAIN, Watch, when_coordination_fails

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
ALONE = "JAX_NUM_PROCESSES=1 runs this process by itself"

log = logging.getLogger("jaxllm")
_watch: Watch | None = None


@dataclasses.dataclass(frozen=True)
class Job:
  """The processes that run together, and which of them this is."""

  address: str  # host:port of process 0
  count: int
  index: int
  local_device_ids: Sequence[int] | None = None


def join_hosts() -> None:
  """Connects this process to the job's other processes, if there are any; call before anything uses a device.

  A TPU pod, SLURM, Open MPI and Kubernetes (an indexed Job or a JobSet) are recognised by JAX itself. Elsewhere every
  process gets JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  From here on the processes end together: see `leave`, and `watch` for one that dies.

  Raises:
    ConfigError: the variables are incomplete or make no sense, or the processes do not come together.
  """
  global _watch
  import jax  # not before a door needs it

  if _watch is not None:
    return
  patience_s = environment.seconds("JAXLLM_HOST_TIMEOUT_S", 30.0)
  start_s = environment.seconds("JAXLLM_START_TIMEOUT_S", 300.0)
  if not jax.distributed.is_initialized():
    job = _job_from_variables() if any(environment.text(name) for name in VARIABLES) else _job_from_cluster(start_s)
    if job is None or job.count == 1:
      return
    _connect(job, patience_s, start_s)
  from jax._src.distributed import global_state  # the service has no public name

  index, count = global_state.process_id, global_state.num_processes
  if count == 1:
    return
  _watch = Watch(global_state.client, index, count, patience_s)
  _watch.start()
  atexit.register(_end_together)
  if index > 0:  # what all would say, the first says
    log.setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
      handler.setFormatter(logging.Formatter(f"process {index}: %(message)s"))


def leave(error: BaseException, code: int, line: str | None = None) -> None:
  """Ends this process and with it the job after an error; does nothing where a process runs by itself.

  The other processes print the error's message and exit with code 2. Nothing waits for them: not the collectives that
  they are in, nor jax's shutdown. An error that may only follow from another process's end waits for that one's.

  Args:
    code: the exit code.
    line: what to print; by default a traceback.
  """
  if _watch is None:
    return
  from jaxllm.parallel.agreement import ElsewhereError

  if _may_be_anothers(error):
    time.sleep(1.5 * _watch.patience_s)  # if another process is gone the watch ends this one
  if line is None:
    line = "".join(traceback.format_exception(error)).rstrip()
  _watch.end(line, code, None if isinstance(error, ElsewhereError) else _reason(error))


def _reason(error: BaseException) -> str:
  """What the other processes say of this one."""
  if isinstance(error, KeyboardInterrupt):
    return "was stopped by hand"
  return "failed: " + (
    _one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0]
  )


def _may_be_anothers(error: BaseException) -> bool:
  """Whether the error is of the kind that a collective, or a question to the coordinator, ends in."""
  chain = (error, error.__cause__, error.__context__)
  status = r"(UNKNOWN|UNAVAILABLE|ABORTED|INTERNAL|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
  return any(re.match(status, str(each)) for each in chain if each is not None)


def _end_together() -> None:
  """At the end of the program: waits for the others under the watch, which jax's own shutdown would not have."""
  assert _watch is not None
  error = getattr(sys, "last_value", None)  # its traceback is printed
  if error is not None:
    leave(error, 1, "")
  from jax._src.distributed import global_state

  try:
    global_state.client.wait_at_barrier("jaxllm/end", 24 * 3600 * 1000)
  except Exception as failed:
    leave(failed, 2)
  _watch.stop()


def _job_from_variables() -> Job | None:
  """The job that JAX's own three variables name."""
  given = {name: value for name in VARIABLES if (value := environment.text(name))}
  if given.get("JAX_NUM_PROCESSES") == "1":
    return None
  if missing := [name for name in VARIABLES if name not in given]:
    raise ConfigError(f"{', '.join(VARIABLES[:-1])} and {VARIABLES[-1]} go together; {', '.join(missing)} is not set")
  address = given["JAX_COORDINATOR_ADDRESS"]
  count, index = (environment.whole(name) or 0 for name in VARIABLES[1:])
  if not index < count:
    raise ConfigError(f"JAX_PROCESS_ID is {index}; with JAX_NUM_PROCESSES={count} it goes from 0 to {count - 1}")
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise ConfigError(f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be host:port of process 0")
  return Job(address, count, index)


def _job_from_cluster(start_s: float) -> Job | None:
  """The job that JAX finds this process to be part of."""
  port = environment.whole("JAX_COORDINATOR_PORT", 1, 65535)
  from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
  from jax._src.clusters import ClusterEnv  # which cluster this is has no public name

  try:
    cluster = next((each for each in ClusterEnv._cluster_types if _runs_here(each)), None)
    if cluster is None:
      return None
    log.debug("cluster: %s", cluster.__name__)
    environment.check_cluster()
    count = cluster.get_process_count()
    if count == 1:
      return None
    where = None if port is None else str(port)
    address = cluster.get_coordinator_address(timeout_secs=int(start_s), override_coordinator_port=where)
    local = None if running_in_cloud_tpu_vm else cluster.get_local_process_id()  # then one device a process
    return Job(address, count, cluster.get_process_id(), None if local is None else [local])
  except Exception as error:
    raise ConfigError(
      f"the job's other processes cannot be found out ({_one_line(error)}); set {', '.join(VARIABLES)}; {ALONE}"
    ) from error


def _runs_here(cluster) -> bool:
  """Whether this process runs in such a cluster, as one of several that belong together."""
  name = cluster.__name__
  if cluster.opt_in_only_method:
    return False
  if name == "K8sCluster" and not environment.text("JOB_COMPLETION_INDEX"):  # a pod by itself
    return False
  if name == "SlurmCluster" and environment.text("SLURM_STEP_NUM_TASKS") == "1":  # a shell in an allocation for more
    return False
  try:
    return cluster.is_env_present()
  except OSError as error:  # the metadata server, which every TPU VM of a pod reaches
    log.warning("no metadata server answers, so this TPU host is taken to be alone: %s", _one_line(error))
    return False


def _connect(job: Job, patience_s: float, start_s: float) -> None:
  """Brings the processes together, or says which one is missing."""
  import jax
  from jax._src import distributed
  from jax._src.lib import _jax, utils

  log.info("process %d of %d, which meet at %s", job.index, job.count, job.address)
  began = time.monotonic()
  if job.index == 0:
    _check_port(job.address)
  else:
    _wait_for_first(job, start_s)

  def lost() -> None:
    line = _what_broke(job)
    if _watch is not None:
      _watch.end(line, gone=0)
    os.write(2, f"process {job.index}: {line}\n".encode())
    os._exit(2)

  # A vote of ours stops all processes at one step; jax's own service for it catches SIGTERM, and tells of dead hosts.
  jax.config.update("jax_enable_preemption_service", False)
  # jax.distributed.initialize takes no callback, so the client's maker gets it.
  make_client = _jax.get_distributed_runtime_client
  callback = when_coordination_fails(lost)
  if callback is not None:
    _jax.get_distributed_runtime_client = functools.partial(make_client, missed_heartbeat_callback=callback)
  try:
    jax.distributed.initialize(
      job.address,
      job.count,
      job.index,
      job.local_device_ids,
      cluster_detection_method="deactivate",
      initialization_timeout=max(1, int(start_s - (time.monotonic() - began))),
      heartbeat_timeout_seconds=int(4 * patience_s) + 1,  # the watch comes first
    )
  except (RuntimeError, ValueError) as error:
    utils.absl_set_min_log_level(3)  # C++ has much to say about the end of what never stood
    distributed.global_state.client = distributed.global_state.service = None
    raise ConfigError(
      f"the {job.count} processes have not come together at {job.address} within {start_s:g} s; "
      f"look at the output of each, and start all of them; {ALONE}"
    ) from error
  finally:
    _jax.get_distributed_runtime_client = make_client


def _what_broke(job: Job) -> str:
  """What the coordination service's end means."""
  time.sleep(1)  # a process that dies may listen a moment longer
  with contextlib.suppress(OSError), socket.create_connection(_host_and_port(job.address), timeout=2):
    return f"error: a process of the job was started a second time while it ran; {AGAIN}"
  return f"error: process 0 is gone; {AGAIN}"


def _check_port(address: str) -> None:
  """Raises ConfigError where something else listens on the coordinator's port."""
  port = _host_and_port(address)[1]
  # All interfaces, as the coordinator will (S104); nothing is listened to, and the port is given up at once.
  for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104
    with contextlib.suppress(OSError), socket.socket(family) as attempt:
      attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      if family == socket.AF_INET6:
        attempt.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
      try:
        attempt.bind((any_address, port))
      except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:  # no such protocol here
          continue
        raise ConfigError(f"port {port}, where the processes shall meet, is taken: {error.strerror}") from error


def _wait_for_first(job: Job, start_s: float) -> None:
  """Returns when process 0 listens."""
  for number, left in enumerate(_seconds_left(start_s)):
    try:
      with socket.create_connection(_host_and_port(job.address), timeout=min(5.0, left)):
        return
    except OSError as error:
      reason = error
    if number == 20:
      log.warning("process %d waits for process 0 at %s (%s)", job.index, job.address, _one_line(reason))
    time.sleep(0.5)
  raise ConfigError(
    f"process 0 does not answer at {job.address} within {start_s:g} s ({_one_line(reason)}); "
    f"is it running, and can its port be reached? {ALONE}"
  )


def _seconds_left(seconds: float) -> Iterator[float]:
  end = time.monotonic() + seconds
  while (left := end - time.monotonic()) > 0:
    yield left


def _host_and_port(address: str) -> tuple[str, int]:
  host, _, port = address.rpartition(":")
  return host.strip("[]"), int(port)


def _one_line(error: BaseException) -> str:
  return (str(error) or type(error).__name__).splitlines()[0]
