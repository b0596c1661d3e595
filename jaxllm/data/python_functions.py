"""Examples out of Python code: every function with a docstring."""

import ast
import io
import warnings
from collections.abc import Iterator


def python_functions(source: bytes, path: str) -> Iterator[dict[str, str]]:
  """The fields of each documented function of a file; a file that does not parse has none.

  `name`; `docstring`; `code`: the function without its docstring; `module`: the file's path with dots;
  `package`: the first part of it.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of odd escapes in other people's strings
      text = source.decode()
      tree = ast.parse(text)
  except (SyntaxError, ValueError, RecursionError):
    return
  module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
  lines = io.StringIO(text, newline=None).readlines()  # splitlines would also cut at form feeds
  for node in ast.walk(tree):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not (docstring := ast.get_docstring(node)):
      continue
    first = node.body[0]
    if first.lineno == node.lineno:  # all on one line: nothing is left without the docstring
      continue
    body = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
    yield {
      "name": node.name,
      "docstring": docstring,
      "code": "".join(body),
      "module": module,
      "package": module.partition(".")[0],
    }
