"""The compilers for chips that are not here are one of the tools."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))
