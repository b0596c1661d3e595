"""The shape of the house: no file imports itself in a circle, and none holds two ideas' worth of lines."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jaxllm"
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path):
  parts = path.relative_to(ROOT.parent).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in FILES}


def imports(path):
  """Files of the package that run because this one imports them, at its top or inside a function."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.module and not node.level, f"{path}: a relative import"
      # `from room import file` names a file where there is one
      found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in NAMES else node.module for a in node.names}
  own = parents(name_of(path))
  # The __init__ of a folder runs before its files do, but those above this file have begun already.
  return {name for other in found for name in {other, *parents(other) - own}} & NAMES.keys() - {name_of(path)}


def parents(name):
  """The packages that a file is in."""
  parts = name.split(".")
  return {".".join(parts[:i]) for i in range(1, len(parts))}


def test_no_circle_of_files():
  graph = {name: imports(path) for name, path in NAMES.items()}
  done, circles = set(), []

  def visit(name, way):
    if name in way:
      circles.append(" -> ".join([*way[way.index(name) :], name]))
    elif name not in done:
      for other in sorted(graph[name]):
        visit(other, [*way, name])
      done.add(name)

  for name in sorted(graph):
    visit(name, [])
  assert not circles, circles


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_over_500_lines(path):
  assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
