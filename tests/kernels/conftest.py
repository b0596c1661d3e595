"""The compilers for chips that are not here are one of the tools; in CI they have to be there: no test skips then."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))


def pytest_sessionstart():
  if os.environ.get("CI") and sys.version_info >= (3, 12):
    import machine_code

    packages = [name for name in ("libtpu", "jax_cuda13_plugin", "qwix") if importlib.util.find_spec(name) is None]
    if missing := packages + [name for name in ("ptxas", "nvdisasm") if machine_code.find_tool(name) is None]:
      raise pytest.UsageError(f"CI tests the kernels with all compilers; missing: {', '.join(missing)}")
