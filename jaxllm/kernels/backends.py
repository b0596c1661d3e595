"""Which backend computes what on which chip: one table, explicit targets, nothing silent."""

import logging

from jaxllm.errors import ConfigError

# Chip -> family. The chip comes from the mesh or the config, never from the machine that compiles.
TARGETS = {
  "cpu": "cpu",
  "a100": "gpu",
  "h100": "gpu",
  "h200": "gpu",
  "b200": "gpu",
  "gpu": "gpu",  # some other GPU
  "v4": "tpu",
  "v5e": "tpu",
  "v5p": "tpu",
  "v6e": "tpu",
  "v7": "tpu",
  "tpu": "tpu",  # some other TPU
}

# op -> family -> backends, the first is what "auto" takes.
BACKENDS = {
  "attention": {"cpu": ("cpu", "xla"), "gpu": ("cudnn", "xla"), "tpu": ("xla",)},
  "matmul": {"cpu": ("cpu", "xla"), "gpu": ("xla",), "tpu": ("xla",)},
  "elementwise": {"cpu": ("cpu", "xla"), "gpu": ("xla",), "tpu": ("xla",)},  # RMSNorm, SwiGLU, RoPE
  "cross_entropy": {"cpu": ("cpu", "xla"), "gpu": ("xla",), "tpu": ("xla",)},
}

_logged: set[tuple[str, str, str]] = set()


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


def choose(op: str, requested: str, target: str) -> str:
  """The backend that computes `op` on `target`; logged the first time.

  Raises:
    ConfigError: an unknown target, or a requested backend that cannot run there.
  """
  if target not in TARGETS:
    raise ConfigError(f"unknown target {target!r}; choose one of {', '.join(TARGETS)}")
  available = BACKENDS[op][TARGETS[target]]
  backend = available[0] if requested == "auto" else requested
  if backend not in available:
    raise ConfigError(f"{op} has no backend {backend!r} on {target}; choose one of {', '.join(available)} or auto")
  if (op, target, backend) not in _logged:
    _logged.add((op, target, backend))
    logging.getLogger("jaxllm").info("%s on %s: %s", op, target, backend)
  return backend
