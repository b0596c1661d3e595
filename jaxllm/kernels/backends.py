"""Which backend computes what on which chip: one table, explicit targets, nothing silent."""

import logging
from collections.abc import Callable

import jax

from jaxllm.errors import ConfigError

# Chip -> family. The chip comes from the mesh or the config, never from the machine that compiles.
TARGETS = {
  "cpu": "cpu",
  "a100": "gpu",
  "h100": "hopper",
  "h200": "hopper",
  "b200": "gpu",
  "gpu": "gpu",  # some other GPU
  "v4": "tpu",
  "v5e": "tpu",
  "v5p": "tpu",
  "v6e": "tpu",
  "v7": "tpu",
  "tpu": "tpu",  # some other TPU
}

# op -> family -> backends; "auto" takes the first that can compute the call. Our kernels for GPUs and TPUs are emulated
# and compiled in the tests and have not run on a chip yet: where something proven is as good, it goes first.
BACKENDS = {
  "attention": {
    "cpu": ("cpu", "xla"),
    "hopper": ("cudnn", "mosaic_gpu", "xla"),
    "gpu": ("cudnn", "xla"),
    "tpu": ("pallas_tpu", "xla"),
  },
  # token_log_probs too
  "cross_entropy": {
    "cpu": ("cpu", "xla"),
    "hopper": ("xla", "mosaic_gpu"),
    "gpu": ("xla",),
    "tpu": ("xla", "pallas_tpu"),
  },
  "grouped_matmul": {
    "cpu": ("xla",),
    "hopper": ("mosaic_gpu", "xla"),
    "gpu": ("xla",),
    "tpu": ("pallas_tpu", "xla"),
  },
  "quantized_matmul": {
    "cpu": ("cpu", "xla"),
    "hopper": ("mosaic_gpu", "xla"),
    "gpu": ("xla",),
    "tpu": ("pallas_tpu", "xla"),
  },
  "paged_attention": {
    "cpu": ("cpu", "xla"),
    "hopper": ("mosaic_gpu", "xla"),
    "gpu": ("xla",),
    "tpu": ("pallas_tpu", "xla"),
  },
  "matmul": {"cpu": ("cpu", "xla"), "hopper": ("xla",), "gpu": ("xla",), "tpu": ("xla",)},
  # RMSNorm, SwiGLU, RoPE
  "elementwise": {"cpu": ("cpu", "xla"), "hopper": ("xla",), "gpu": ("xla",), "tpu": ("xla",)},
}

# Backends whose kernels are written for this or later versions of jax.
LEAST_JAX = {"mosaic_gpu": (0, 11), "pallas_tpu": (0, 11)}

_logged: dict[tuple[str, str, str, str], None] = {}  # in order


def chosen(op: str, target: str) -> tuple[str, ...]:
  """The backends that `op` was traced with for `target` in this process so far."""
  return tuple(dict.fromkeys(entry[2] for entry in _logged if entry[:2] == (op, target)))


def target_from_device_kind(platform: str, device_kind: str) -> str:
  """The target name of a jax device, from its platform and `device_kind`."""
  if platform == "cpu":
    return "cpu"
  kind = device_kind.lower()
  if platform in ("gpu", "cuda", "rocm"):
    return next((chip for chip in ("a100", "h100", "h200", "b200") if chip in kind), "gpu")
  for mark, chip in (
    ("v5 lite", "v5e"),
    ("v5e", "v5e"),
    ("v6", "v6e"),
    ("v5", "v5p"),
    ("v4", "v4"),
    ("7", "v7"),
  ):
    if mark in kind:
      return chip
  return "tpu"


def choose(
  op: str, requested: str | None, target: str | None, refuses: Callable[[str, str | None], str | None] | None = None
) -> str:
  """The backend that computes `op` on `target`; logged the first time, with what was passed over and why.

  Args:
    requested: a backend's name, or "auto" for the first of the table that does not refuse. None: "auto" where a target
      is given, else "xla", which is said once in the log, because it may not be the chip's fastest.
    target: a chip of `TARGETS`. None: unknown, so a backend has to be named and the table is not asked.
    refuses: (backend, target) -> why it cannot compute this call, or None.

  Raises:
    ConfigError: an unknown target, or a requested backend that cannot run there or refuses.
  """
  if requested is None:
    requested = "xla" if target is None else "auto"
    if target is None and (op, "", requested, "") not in _logged:
      _logged[op, "", requested, ""] = None
      logging.getLogger("jaxllm").info("%s: xla, because neither backend= nor target= is given", op)
  if target is None:
    if requested == "auto":
      raise ConfigError(f"{op}: backend 'auto' needs target=, the chip; choose one of {', '.join(TARGETS)}")
    available: tuple[str, ...] = (requested,)
    known = {name for names in BACKENDS[op].values() for name in names}
    if requested not in known:
      raise ConfigError(f"{op} has no backend {requested!r}; choose one of {', '.join(sorted(known))}")
  elif target not in TARGETS:
    raise ConfigError(f"unknown target {target!r}; choose one of {', '.join(TARGETS)}")
  else:
    available = BACKENDS[op][TARGETS[target]]
  if requested != "auto":
    if requested not in available:
      raise ConfigError(f"{op} has no backend {requested!r} on {target}; choose one of {', '.join(available)} or auto")
    if reason := _reason(requested, target, refuses):
      raise ConfigError(f"{op} backend {requested!r} cannot compute this call: {reason}")
    backend, passed = requested, ""
  else:
    reasons: dict[str, str | None] = {}
    for backend in available:
      reasons[backend] = _reason(backend, target, refuses)
      if reasons[backend] is None:
        break
    else:
      raise ConfigError(f"{op} on {target}: no backend can, {'; '.join(f'{b}: {r}' for b, r in reasons.items())}")
    passed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
  if target is not None and (op, target, backend, passed) not in _logged:
    _logged[op, target, backend, passed] = None
    # Slower than the chip's own kernel is worth a warning; on a CPU "xla" is a fair choice.
    level = logging.WARNING if passed and TARGETS[target] != "cpu" else logging.INFO
    logging.getLogger("jaxllm").log(level, "%s on %s: %s%s", op, target, backend, f" ({passed})" if passed else "")
  return backend


def _reason(backend, target, refuses) -> str | None:
  """Why a backend cannot compute a call, or None."""
  if (least := LEAST_JAX.get(backend)) and tuple(int(n) for n in jax.__version__.split(".")[:2]) < least:
    return f"needs jax {'.'.join(map(str, least))}, this is {jax.__version__}"
  return refuses(backend, target) if refuses else None
