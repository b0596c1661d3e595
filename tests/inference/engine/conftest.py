"""The tests of this folder use the tiny models of two others."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[n] / name) for n, name in ((1, ""), (2, "models"))]
