"""Which backend computes what on which chip: one table, explicit targets, nothing silent."""

import logging
from collections.abc import Callable

import jax

from jaxllm.base.chips import TARGETS
from jaxllm.base.errors import ConfigError
from jaxllm.kernels import cpu_ffi

# Of an op with a C++ kernel, and of one with our kernels for accelerators besides.
_CPU = {"cpu": ("cpu", "xla", "cpu_invariant"), "hopper": ("xla",), "gpu": ("xla",), "tpu": ("xla",)}
_OURS = _CPU | {"hopper": ("mosaic_gpu", "xla"), "tpu": ("pallas_tpu", "xla")}
# op -> family -> backends, in the order that we would want had all of them been measured; "auto" takes the first that
# can compute the call and may be taken (`choose`). On CPUs everything here is measured. What a backend is: `dispatch`.
BACKENDS: dict[str, dict[str, tuple[str, ...]]] = {
  "attention": _OURS | {"hopper": ("cudnn", "mosaic_gpu", "cudnn_packed", "xla"), "gpu": ("cudnn", "xla")},
  # attention within segments, for which cuDNN's plain form reads a mask
  "packed_attention": _OURS | {"hopper": ("cudnn_packed", "mosaic_gpu", "cudnn", "xla"), "gpu": ("cudnn", "xla")},
  "cross_entropy": _OURS,  # token_log_probs too
  "grouped_matmul": _OURS | {"cpu": ("xla",)},
  "quantized_matmul": _OURS,
  "paged_attention": _OURS,
  "matmul": _CPU,
  "elementwise": _CPU,  # RMSNorm, SwiGLU, RoPE
}

INVARIANT = "cpu_invariant"  # of the batch-invariant mode: each row as if it were alone; "auto" never takes it
PALLAS = ("mosaic_gpu", "pallas_tpu")  # what kernels="pallas" asks for
# What has to be measured on a chip before "auto" takes it there: our Pallas kernels, and the packed layout of cuDNN,
# which is reached through a private function of jax and with offsets of our making.
UNPROVEN = (*PALLAS, "cudnn_packed")
# (op, backend) -> chip -> the record that shows it right there, and no slower than what follows it in its row: a file
# that `tools/bench_kernels.py` wrote into experiments/benchmarks/. None of UNPROVEN has run on a chip yet.
MEASURED: dict[tuple[str, str], dict[str, str]] = {}

# Backends that need this or a later jax.
LEAST_JAX = {
  "mosaic_gpu": (0, 11),
  "pallas_tpu": (0, 11),
  "cudnn_packed": (0, 11, 2),  # before, offsets of the keys went wrong where heads are grouped
}

_logged: dict[tuple[str, str, str, str], None] = {}  # in order


def chosen(op: str, target: str) -> dict[str, str]:
  """The backends that `op` was traced with for `target` in this process so far, each with what was passed over."""
  return {backend: passed for name, chip, backend, passed in _logged if (name, chip) == (op, target)}


def has_bfloat16(target: str) -> bool:
  """Whether the chip multiplies bfloat16 in hardware of its own, and our kernels there make use of it."""
  if TARGETS.get(target) == "cpu":
    return "amx_bf16" in cpu_ffi.cpu_flags() and cpu_ffi.available()
  return target != "gpu"  # of some other GPU nothing is known


def _family(target: str) -> str:
  if target not in TARGETS:
    raise ConfigError(f"unknown target {target!r}; choose one of {', '.join(TARGETS)}")
  return TARGETS[target]


def choose(
  op: str,
  requested: str | None,
  target: str | None,
  refuses: Callable[[str, str | None], str | None] | None = None,
  quadratic: Callable[[str], str | None] | None = None,
) -> str:
  """The backend that computes `op` on `target`; logged the first time, with what was passed over and why.

  "auto" takes the first of its row that can compute the call, passing over what was not measured on this chip and what
  needs memory of queries times keys. Where nothing else is left, unmeasured comes before quadratic.

  Args:
    requested: a backend's name, which is taken or raises; "auto"; or "pallas": our Pallas kernel, or where there is
      none or it refuses, as "auto". None: "auto" where a target is given, else "xla", which is said once in the log,
      because it may not be the chip's fastest.
    target: a chip of `TARGETS`. None: unknown, so a backend has to be named and the table is not asked.
    refuses: (backend, target) -> why it cannot compute this call, or None.
    quadratic: backend -> what it holds whose size is queries times keys, or None.

  Raises:
    ConfigError: an unknown target, or a requested backend that cannot run there or refuses.
  """
  if requested is None:
    requested = "xla" if target is None else "auto"
    if target is None and (op, "", requested, "") not in _logged:
      _logged[op, "", requested, ""] = None
      logging.getLogger("jaxllm").info("%s: xla, because neither backend= nor target= is given", op)
  if target is None:
    if requested in ("auto", "pallas"):
      raise ConfigError(f"{op}: backend {requested!r} needs target=, the chip; choose one of {', '.join(TARGETS)}")
    known = {name for names in BACKENDS[op].values() for name in names}
    if requested not in known:
      raise ConfigError(f"{op} has no backend {requested!r}; choose one of {', '.join(sorted(known))}")
    _take(op, requested, target, refuses)
    return requested
  available = BACKENDS[op][_family(target)]
  if requested in ("auto", "pallas"):
    backend, passed = _best(op, requested, target, refuses, quadratic)
  elif requested in available:
    _take(op, requested, target, refuses)
    backend, passed = requested, _unmeasured(op, requested, target) or ""
  else:
    raise ConfigError(f"{op} has no backend {requested!r} on {target}; choose one of {', '.join(available)} or auto")
  if (op, target, backend, passed) not in _logged:
    _logged[op, target, backend, passed] = None
    # Slower than the chip's own kernel is worth a warning, and so is one that never ran there; on a CPU "xla" is fair.
    level = logging.WARNING if passed and TARGETS[target] != "cpu" else logging.INFO
    logging.getLogger("jaxllm").log(level, "%s on %s: %s%s", op, target, backend, f" ({passed})" if passed else "")
  return backend


def check_pallas(target: str) -> None:
  """That kernels="pallas" means something on a chip.

  Raises:
    ConfigError: an unknown target, one that no Pallas kernel of ours is for, or a jax that is too old for them.
  """
  of_target = _family(target)
  ours = {family: set(PALLAS) & {n for rows in BACKENDS.values() for n in rows[family]} for family in TARGETS.values()}
  names = ours[of_target]
  if not names:
    chips = ", ".join(chip for chip, family in TARGETS.items() if ours[family])
    raise ConfigError(
      f"kernels is 'pallas', but there are Pallas kernels for {chips} only, not for {target}; take 'auto'"
    )
  if all(reasons := [_too_old(name) for name in names]):
    raise ConfigError(f"kernels is 'pallas', which {reasons[0]}; take 'auto' or install a later jax")


def check_invariant(target: str, dtype: str) -> None:
  """That the batch-invariant mode is there for a chip and a dtype.

  Raises:
    ConfigError: it is not, and why.
  """
  of_target, reason = _family(target), cpu_ffi.why_unavailable()
  if of_target != "cpu":
    reason = f"it is of CPUs only, and compute.target is {target!r}"
  elif reason is None and dtype not in ("float32", "bfloat16"):
    reason = f"it is for compute.dtype 'float32' and 'bfloat16', not {dtype!r}"
  elif reason is None and not cpu_ffi.available():
    reason = "the C++ kernels are switched off or did not build"
  if reason is not None:
    raise ConfigError(f"compute.batch_invariant is not possible here: {reason}")


def _best(op, requested, target, refuses, quadratic) -> tuple[str, str]:
  """The backend for a call that names none, and what there is to say of it and of those that were passed over."""
  available = BACKENDS[op][TARGETS[target]]
  hard = {name: _reason(name, target, refuses) for name in available}
  able = [name for name in available if hard[name] is None]
  if not able:
    raise ConfigError(f"{op} on {target}: no backend can, {'; '.join(f'{b}: {r}' for b, r in hard.items())}")
  asked_for = {name for name in available if requested == "pallas" and name in PALLAS}
  large = {name: quadratic(name) if quadratic else None for name in able}
  unmeasured = {name: _unmeasured(op, name, target) for name in able}
  best = min(able, key=lambda name: (name not in asked_for, bool(large[name]), bool(unmeasured[name])))
  said = {name: hard[name] or large[name] or unmeasured[name] for name in available[: available.index(best)]}
  said |= {name: hard[name] for name in asked_for if hard[name]}
  if best in asked_for:
    said = {}
  reasons = {reason: ", ".join(name for name in said if said[name] == reason) for reason in said.values() if reason}
  own = [reason for reason in (large[best], unmeasured[best]) if reason]
  return best, "; ".join(own + [f"{names}: {reason}" for reason, names in reasons.items()])


def _unmeasured(op, backend, target) -> str | None:
  return "not measured on this chip" if backend in UNPROVEN and target not in MEASURED.get((op, backend), {}) else None


def _take(op, backend, target, refuses) -> None:
  if reason := _reason(backend, target, refuses):
    raise ConfigError(f"{op} backend {backend!r} cannot compute this call: {reason}")


def _reason(backend, target, refuses) -> str | None:
  """Why a backend cannot compute a call, or None."""
  return _too_old(backend) or (refuses(backend, target) if refuses else None)


def _too_old(backend) -> str | None:
  if (least := LEAST_JAX.get(backend)) and jax.__version_info__ < least:
    return f"needs jax {'.'.join(map(str, least))}, this is {jax.__version__}"
  return None
