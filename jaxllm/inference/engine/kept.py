"""Compiled programs kept on disk, so that the next start need not compile them again."""

import hashlib
import logging

import jax
import jaxlib
from jax.experimental.compilation_cache import compilation_cache

from jaxllm.kernels import cpu_library

log = logging.getLogger("jaxllm")


def keep_programs() -> None:
  """Keeps what this process compiles from here on in `$JAXLLM_CACHE_DIR` or ~/.cache/jaxllm, by jax's version and
  this CPU; unless jax has been told where (JAX_COMPILATION_CACHE_DIR), or told not to (JAX_ENABLE_COMPILATION_CACHE).
  """
  told = jax.config.values
  if told["jax_compilation_cache_dir"] or not told["jax_enable_compilation_cache"]:
    return
  machine = hashlib.sha256(" ".join(sorted(cpu_library.cpu_flags())).encode()).hexdigest()[:12]
  try:
    folder = cpu_library.cache_dir() / f"programs-{jaxlib.__version__}-{machine}"
    reason = cpu_library.make_private(folder)  # a program that another user could write is one that this one runs
  except cpu_library.BuildError as error:
    reason = str(error)
  if reason:
    log.warning("compiled programs are not kept: %s", reason)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  compilation_cache.reset_cache()  # what was compiled before has settled that there is none
