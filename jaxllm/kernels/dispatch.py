"""From a public function to one of its backends: which may compute the call, and how it is differentiated.

A backend of an op is one module in the op's package and its name in one row of `backends.BACKENDS` ("xla" is the module
`reference`). Under the same names for every op a module has

    forward(call, *arrays)      the results
    backward(call, ...)         gradients, of what the op's `kept` keeps; none where jax differentiates `forward`
    refuses(call, *arrays)      why it cannot compute the call, or None; none where it computes all
    quadratic(call, *arrays)    what it holds whose size is queries times keys, or None; none where nothing is

The last two look at shapes and dtypes only. What the arrays are stands in the op's `api`.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import backends


def _forward(call, *arrays):
  return call.module.forward(call, *arrays)


def _keep_arrays(call, *arrays):
  return run(call, *arrays), arrays


def _backward(call, kept, d):
  return call.module.backward(call, *kept, d)


@dataclasses.dataclass(frozen=True)
class Op:
  """What the backends of a function have in common around theirs; the defaults add nothing.

  forward: (call, *arrays) -> results.
  kept: (call, *arrays) -> (results, what the backward pass needs); results by `run`, so that this too may be
    differentiated.
  backward: (call, kept, gradients of the results) -> a gradient for each array, None for those that have none.
  once: a second derivative is an error.
  """

  package: str  # in `jaxllm.kernels`
  forward: Callable = _forward
  kept: Callable = _keep_arrays
  backward: Callable = _backward
  once: bool = False


@dataclasses.dataclass(frozen=True)
class Call:
  """What is fixed when a call is traced. options: the op's own, hashable."""

  op: Op
  backend: str
  target: str | None = None
  options: Any = None

  @property
  def module(self) -> Any:
    name = "reference" if self.backend == "xla" else self.backend
    return importlib.import_module(f"jaxllm.kernels.{self.op.package}.{name}")

  def ask(self, question: str, *arrays) -> str | None:
    """What the backend says to "refuses" or "quadratic"."""
    answer = getattr(self.module, question, None)
    return answer and answer(self, *arrays)


def choose(name: str, op: Op, backend: str | None, target: str | None, options: Any, *arrays) -> Call:
  """The call by the backend that computes it; arguments and errors as in `backends.choose`.

  Args:
    name: the op's in `backends.BACKENDS`.
    arrays: those of the call.
  """
  refuses = lambda backend, target: Call(op, backend, target, options).ask("refuses", *arrays)  # noqa: E731
  quadratic = lambda backend: Call(op, backend, target, options).ask("quadratic", *arrays)  # noqa: E731
  return Call(op, backends.choose(name, backend, target, refuses, quadratic), target, options)


def run(call: Call, *arrays):
  """The results of the call, differentiable."""
  return _run(call, *arrays) if hasattr(call.module, "backward") else call.op.forward(call, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(call, *arrays):
  return call.op.forward(call, *arrays)


def _gradients(call, kept, d):
  return _once(call, kept, d) if call.op.once else call.op.backward(call, kept, d)


_run.defvjp(lambda call, *arrays: call.op.kept(call, *arrays), _gradients)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _once(call, kept, d):
  return call.op.backward(call, kept, d)


@_once.defjvp
def _(call, primals, tangents):
  raise ConfigError(f"{call.op.package}: there is no second derivative")
