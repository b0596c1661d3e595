"""What a case is, and what all cases' oracles share."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SDS = jax.ShapeDtypeStruct
ROWS = 32  # rows of a result that an oracle asks for, where it asks for the last


@dataclasses.dataclass(frozen=True)
class Case:
  """One kernel at one shape."""

  op: str
  name: str
  inputs: tuple[Any, ...]  # pytrees of ShapeDtypeStructs
  ours: Callable[[str, str], Callable]  # (backend, target) -> function of the inputs
  others: dict[str, Callable] = dataclasses.field(default_factory=dict)  # peer -> function of the same inputs
  oracle: Callable | None = None  # (inputs, result) -> (part of the result, the same in float64), numpy
  flops: float = 0.0
  bytes: float = 0.0  # that must move at least
  backends: tuple[str, ...] = ("mosaic_gpu", "pallas_tpu", "cudnn", "cpu", "xla")
  make: Callable[[np.random.Generator], tuple] | None = None  # inputs that are more than random numbers
  torch: Callable | None = None  # the same function of torch tensors
  # Names of a program's kernels -> FLOP of each, for estimates; None where the products do not set a kernel's pace.
  parts: Callable[[list[str]], list[float | None]] | None = None
  width: int | None = None  # the side of all products that may be smaller than a matrix unit
  # "target": a shape that the kernels are held to; "shape": another that models have; "option": one option more than
  # a plain call; "values": the program of another case with inputs of another distribution.
  tags: frozenset[str] = frozenset()

  @property
  def dtype(self) -> str:
    """Of the first input."""
    return jnp.dtype(jax.tree.leaves(self.inputs)[0].dtype).name

  def kernel_flops(self, names: list[str]) -> list[float | None]:
    """Of each kernel of a program, where they are known."""
    return [None] * len(names) if self.parts is None else self.parts(names)

  def values(self, seed: int = 0) -> tuple:
    """Random inputs: zeros would run faster than real data."""
    rng = np.random.default_rng(seed)
    if self.make is not None:
      return self.make(rng)
    draw = lambda s: jnp.asarray(rng.standard_normal(s.shape, dtype=np.float32)).astype(s.dtype)  # noqa: E731
    return jax.tree.map(draw, self.inputs)


def tagged(tag: str, *cases: Case) -> list[Case]:
  """The same cases with one tag more."""
  return [dataclasses.replace(case, tags=case.tags | {tag}) for case in cases]


def installed(name: str) -> bool:
  """Whether a peer's package can be imported."""
  return importlib.util.find_spec(name) is not None


def alone(flops: float) -> Callable:
  """`Case.parts` of programs of one kernel."""
  return lambda names: [flops] if len(names) == 1 else [None] * len(names)


def float64(x) -> np.ndarray:
  return np.asarray(x, np.float64)


def joined(*parts: tuple[Any, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Parts of a result of several arrays as one, each in units of its own root mean square: none hides behind another.

  parts: (what was computed, the same in float64).
  """
  got, want = [], []
  for a, b in parts:
    unit = np.sqrt(np.mean(b**2)) or 1.0
    got.append(float64(a).ravel() / unit)
    want.append(b.ravel() / unit)
  return np.concatenate(got), np.concatenate(want)
