"""How many pages there is memory for."""

import os
from collections.abc import Mapping

import jax

from jaxllm.base.errors import ConfigError
from jaxllm.models.caches import init_paged_cache
from jaxllm.models.config import ModelConfig
from jaxllm.models.stores import Paged

SHARE = 0.8  # of the free memory that pages may take


def page_bytes(config: ModelConfig, page_size: int, dtype: str, target: str) -> dict[str, int]:
  """Bytes of a page of each kind, all layers of the kind together."""
  kinds = {"local" if kind == "local" else "global" for kind in config.layer_kinds}
  many = dict.fromkeys(kinds, 8)

  def make():
    return init_paged_cache(config, 1, page_size, pages=many, page_size=page_size, dtype=dtype, target=target)

  found = dict.fromkeys(kinds, 0)
  for layer in jax.eval_shape(make).layers:
    assert isinstance(layer, Paged)
    found[layer.table] += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layer)) // 8
  return found


def free_bytes(device: jax.Device) -> int:
  """Memory of a device that nobody uses; of a CPU, the host's."""
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  try:
    with open("/proc/meminfo") as file:
      found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    return found["MemAvailable"]
  except (OSError, KeyError):  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def affordable(
  wanted: Mapping[str, int], least: Mapping[str, int], sizes: Mapping[str, int], free: int
) -> dict[str, int]:
  """As many of the wanted pages of each kind as a share of the free memory holds, all kinds cut alike.

  Args:
    least: what one request of the greatest length needs. sizes: bytes of a page.

  Raises:
    ConfigError: not even that much is there; the message says what to do.
  """
  room, need = SHARE * free, sum(sizes[kind] * count for kind, count in wanted.items())
  pages = {kind: count if need <= room else int(count * room / need) for kind, count in wanted.items()}
  if any(pages[kind] < least[kind] for kind in pages):
    alone = sum(sizes[kind] * count for kind, count in least.items())
    raise ConfigError(
      f"one request of max_model_len needs {alone / 2**30:.2f} GiB of keys and values; {room / 2**30:.2f} are there: "
      "lower max_model_len, keep them in fewer bits (kv_dtype), or set num_pages"
    )
  return pages
