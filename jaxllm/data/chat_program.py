"""A chat template as `transformers` runs it (`apply_chat_template`), in a process with limits: see `base.bounded`.

Jinja's sandbox keeps a template from what is not its own; block tags take their line with them, `tojson` escapes no
HTML, and `raise_exception`, `strftime_now`, loop controls and {% generation %} exist. This file imports no jaxllm.
"""

import datetime
import functools
import json

import jinja2
import jinja2.ext
import jinja2.sandbox


class Refusal(Exception):
  """The template called raise_exception."""


class Broken(Exception):
  """The template is no Jinja; the message begins with the line."""


def run(template: str, inputs: str) -> str:
  """The text of a chat.

  Args:
    inputs: JSON of the variables, and of the marks around {% generation %} (none or two).
  """
  variables, marks = json.loads(inputs)
  try:
    return _compiled(template, *marks).render(**variables)
  except jinja2.TemplateSyntaxError as error:
    raise Broken(f"{error.lineno}: {_line(error.message)}") from error
  except (jinja2.TemplateError, Refusal) as error:
    raise type(error)(_line(error)) from error


def _line(message) -> str:
  return " ".join(str(message)[:2000].split())


def _raise_exception(message):
  raise Refusal(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=32)
def _compiled(template: str, *marks: str) -> jinja2.Template:
  class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks what an assistant writes; by default it leaves no trace."""

    tags = {"generation"}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      if marks:
        begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in marks)
        body = [begin, *body, end]
      return jinja2.nodes.Scope(body, lineno=line)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = _tojson
  environment.globals["raise_exception"] = _raise_exception
  environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
  return environment.from_string(template)
