"""What the processes of a run know together.

A signal, a full disk or a slow file system is one host's own affair; a collective is everybody's. So whatever decides
whether processes do something together (save, stop, evaluate, start) is a value from here, the same on all of them,
and never a fact that one host has seen for itself.

The exchange goes through jax's coordination service and not through the devices: it neither waits for the steps that
are dispatched nor comes between their collectives, and takes about a millisecond.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxllm.base.errors import ConfigError, UserError

PATIENCE_S = 3600.0  # for a host that is slow; one that is dead is noticed earlier, see `hosts`

_rounds = itertools.count()


class ElsewhereError(UserError):
  """Another process failed, and has said so itself."""


def gather(value: Any) -> list[Any]:
  """Every process's value, in the order of the processes, on all of them.

  All processes must make the same calls in the same order, from one thread. Values are JSON.

  Raises:
    UserError: a process does not answer.
  """
  if jax.process_count() == 1:
    return [value]
  client, index, count = _client(), jax.process_index(), jax.process_count()
  number = next(_rounds)
  here = f"jaxllm/agreement/{number}/"
  client.key_value_set(here + str(index), json.dumps(value))
  if index > 0:
    return json.loads(_wait(client, here + "all", 0))
  there = {key.removeprefix(here): text for key, text in client.key_value_dir_get(here)}
  values = [json.loads(there.get(str(i)) or _wait(client, f"{here}{i}", i)) for i in range(count)]
  client.key_value_set(here + "all", json.dumps(values))
  # Whoever takes part in this round has read the one before.
  client.key_value_delete(f"jaxllm/agreement/{number - 1}/")
  return values


def everywhere(ok: bool) -> bool:
  """Whether `ok` holds on every process; a barrier as well."""
  return all(gather(bool(ok)))


def anywhere(flag: bool) -> bool:
  """Whether `flag` holds on some process; a barrier as well."""
  return any(gather(bool(flag)))


def first_does(function: Callable[[], Any]) -> Any:
  """Calls the function on the first process alone; what it returns (JSON), or that it failed, all of them get.

  The first process raises the error itself, the others a UserError with its message.
  """
  value, error = None, None
  if jax.process_index() == 0:
    try:
      value = function()
    except Exception as caught:
      error = caught
  value, failure = from_first([value, None if error is None else str(error) or type(error).__name__])
  if error is not None:
    raise error
  if failure is not None:
    raise UserError(f"process 0 failed: {failure}")
  return value


def to_first(name: str, value: Any) -> list[Any] | None:
  """Every process's value (JSON) on the first, which waits for them; None on the others, which do not wait.

  From any thread. `name` is the same on all processes and used once in the life of the job.
  """
  if jax.process_count() == 1:
    return [value]
  if jax.process_index() > 0:
    post(name, value)
    return None
  client, here = _client(), f"jaxllm/{name}/"
  values = [value, *(json.loads(_wait(client, f"{here}{i}", i)) for i in range(1, jax.process_count()))]
  client.key_value_delete(here)
  return values


def post(name: str, value: Any) -> None:
  """Leaves a value (JSON) for the others to find with `posted`, from any thread; once for a name."""
  if jax.process_count() > 1:
    _client().key_value_set(f"jaxllm/{name}/{jax.process_index()}", json.dumps(value))


def posted(name: str) -> dict[int, Any]:
  """What processes have posted under the name so far; this asks and does not wait, so it differs between them."""
  if jax.process_count() == 1:
    return {}
  found = _client().key_value_dir_get(f"jaxllm/{name}/")
  return {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in found}


def from_first(value: Any = None) -> Any:
  """The first process's value on all of them; what the others hand in does not matter."""
  return gather(value if jax.process_index() == 0 else None)[0]


def check_same(facts: Mapping[str, Any], what: str) -> None:
  """That every process has the same `facts` (JSON values by name).

  Raises:
    ConfigError, on all processes: `what` differs; the message names the first such fact.
  """
  first, *others = gather(dict(facts))
  for index, other in enumerate(others, 1):
    for name in dict.fromkeys([*first, *other]):
      if first.get(name) != other.get(name):
        raise ConfigError(
          f"{what} differs between processes: {name} is {first.get(name)!r} on process 0 and {other.get(name)!r} on "
          f"process {index}; give all of them the same"
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Runs what may fail on one host alone, and fails on all if it failed on any; no collective may stand inside.

  The process that failed raises its own error, the others an ElsewhereError with its message.
  """
  error: Exception | None = None
  try:
    yield
  except Exception as caught:
    error = caught
  failures = gather(None if error is None else str(error) or type(error).__name__)
  if error is not None:
    raise error
  for index, message in enumerate(failures):
    if message is not None:
      raise ElsewhereError(f"process {index} failed: {message}")


def _client() -> Any:
  from jax._src.distributed import global_state  # the service has no public name

  return global_state.client


def _wait(client: Any, key: str, index: int) -> str:
  """The value that process `index` sets."""
  try:
    return client.blocking_key_value_get(key, int(PATIENCE_S * 1000))
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"process {index} does not answer: {str(error).splitlines()[0]}") from error
