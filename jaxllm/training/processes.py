"""Agreement between the processes of a run."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def everywhere(ok: bool) -> bool:
  """Whether `ok` holds on every process; a barrier as well, so all must call it at the same point."""
  if jax.process_count() == 1:
    return ok
  return bool(multihost_utils.process_allgather(np.asarray(ok)).all())
