"""The example of docs/adding_a_family.md is the family in the house, and families are as short as the page says."""

import re
from pathlib import Path

import pytest

from jaxllm.interop import families

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_family.md"
TABLES = Path(families.__file__).parent
SHARED = {"__init__", "class_defaults", "keys", "table", "rope"}


def test_the_example():
  [example] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
  assert example == (TABLES / "starcoder2.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted({path.stem for path in TABLES.glob("*.py")} - SHARED))
def test_families_of_one_file_are_short(name):
  assert len((TABLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80
