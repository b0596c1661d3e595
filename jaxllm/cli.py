"""What the doors share: reading `--config`, reporting errors, exit codes."""

import argparse
import contextlib
import io
import logging
import math
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from jaxllm.base import environment, settings, stopping
from jaxllm.base.errors import ConfigError, UserError, one_line
from jaxllm.base.files import local_path
from jaxllm.base.os_errors import explain

_HOW = ("encoding", "errors", "line_buffering", "write_through")  # a stream writes


class _Stdout(io.TextIOWrapper):
  """Says of its errors that they are its own."""

  def write(self, text: str) -> int:
    with _named("stdout"):
      return super().write(text)

  def flush(self) -> None:
    with _named("stdout"):
      super().flush()


class _Stderr(io.TextIOWrapper):
  """What is said goes nowhere where nobody can hear it: the work goes on."""

  def write(self, text: str) -> int:
    with contextlib.suppress(OSError):
      return super().write(text)
    return len(text)

  def flush(self) -> None:
    with contextlib.suppress(OSError):
      super().flush()


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    error.filename = error.filename or name
    raise


def open_standard_streams() -> None:
  """Gives stdin, stdout and stderr that the parent has closed a place of their own: else the next file that is opened
  would be taken for one of them. Reading or writing the first two fails, as it should; what is said goes nowhere."""
  for name, mode, way in (("stdin", "r", os.O_WRONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY)):
    if getattr(sys, name) is None:  # the lowest number that is free is its
      setattr(sys, name, os.fdopen(os.open(os.devnull, way), mode))
  for name, kind in (("stdout", _Stdout), ("stderr", _Stderr)):
    out = getattr(sys, name)
    if type(out) is io.TextIOWrapper:
      how: dict[str, Any] = {key: getattr(out, key) for key in _HOW}
      setattr(sys, name, kind(out.buffer, **how))
      setattr(sys, f"__{name}__", out)  # which would take the buffer along


def _say(kind: type[BaseException], error: BaseException, trace: Any) -> None:
  """Reports what went wrong before a door began, while it was imported."""
  line = None if "--debug" in sys.argv else explain_error(error)
  if line is None:
    sys.__excepthook__(kind, error, trace)
  else:
    stopping.leave(2, f"error: {line}\n".encode(errors="replace"))


LEAST_FILES = 64  # that a door may need to have open
# Below which libraries abort, or wait for threads that could not start: of private memory, of which training the least
# model takes 1.8 GiB on two cores, stacks of threads and what the allocator keeps included; and of addresses
LEAST_MEMORY = {resource.RLIMIT_DATA: ("d", 3 << 30), resource.RLIMIT_AS: ("v", 4 << 30)}


def check_limits() -> None:
  """Allows this program as many open files as its parent lets it, and ends it where its limits are too low to begin:
  C++ just aborts where there are too few files or too little memory."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != hard:
    with contextlib.suppress(OSError, ValueError):
      resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
  wrong = ""
  if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
    wrong = f"{hard} open files is too low; raise it (ulimit -n {LEAST_FILES})"
  for kind, (flag, least) in LEAST_MEMORY.items():
    soft, _ = resource.getrlimit(kind)
    if soft != resource.RLIM_INFINITY and soft < least:
      wrong = f"{soft >> 20} MiB of memory is too low for JAX; raise it (ulimit -{flag} {least >> 10})"
  if wrong:
    stopping.leave(2, f"error: a limit of {wrong}\n".encode())


if stopping.runs_a_door():  # before anything that takes long is imported
  sys.excepthook = _say
  if "--debug" not in sys.argv:
    # What a library's callback or a destructor raises is nobody's to mend, or said elsewhere.
    sys.unraisablehook = lambda raised: logging.getLogger("jaxllm").debug("%s", raised)
  open_standard_streams()
  stopping.install()
  check_limits()

MODEL_FORMS = "a model directory, training run, Hugging Face directory, LoRA adapter or .gguf file"


def run_door(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
  """Runs a door's `main(argv)`; what the user can mend becomes one line and exit code 2, a traceback with --debug.

  A signal ends a door with one line and 128 + its number, see `jaxllm.base.stopping`. In a job of several processes an
  error does not return: it ends this process at once, and the others with it.
  """
  is_program = stopping.runs_a_door()
  argv = list(sys.argv[1:] if argv is None else argv)
  debug = "--debug" in argv
  argv = [a for a in argv if a != "--debug"]
  logging.basicConfig(format="%(message)s", level=logging.WARNING)
  logging.raiseExceptions = debug  # a log that nobody can read must not fill it with tracebacks
  logging.getLogger("jaxllm").setLevel(logging.INFO)
  for library in ("absl", "asyncio"):  # which say again what we say
    logging.getLogger(library).setLevel(logging.ERROR if debug else logging.CRITICAL)
  code = 0
  try:
    try:
      environment.check()
      code = main(argv) or 0
    except SystemExit as stop:  # argparse's
      code = stop.code if isinstance(stop.code, int) else 1
      if not is_program:
        raise
    sys.stdout.flush()
  except KeyboardInterrupt as error:
    code = getattr(error, "code", 130)
    leave(error, code, "stopped")
    if is_program:
      stopping.leave(code, stopping.LINE)
    print("stopped", file=sys.stderr)
  except BrokenPipeError as error:
    code = 128 + signal.SIGPIPE  # as a program ends whose reader is gone: it may not be done
    leave(error, code, "error: nobody reads the output")
    if error.filename != "stdout":
      print(f"error: {explain_error(error)}", file=sys.stderr, flush=True)
    _to_nowhere(sys.stdout)
  except BaseException as error:
    if stopping.interrupted is not None:
      leave(error, 128 + stopping.interrupted, "stopped")
      stopping.leave(128 + stopping.interrupted, stopping.LINE)
    line = explain_error(error)
    code = 1 if line is None else 2
    leave(error, code, None if debug or line is None else f"error: {line}")
    if debug or line is None:
      raise
    with contextlib.suppress(OSError):
      print(f"error: {line}", file=sys.stderr, flush=True)
    _to_nowhere(sys.stdout)
  if is_program:
    stopping.finish(code)
  return code


def explain_error(error: BaseException) -> str | None:
  """One line for an error that the user can mend; None for a bug of ours."""
  if isinstance(error, UserError):
    return str(error)
  if isinstance(error, UnicodeDecodeError):  # of stdin: files are read by those who know their names
    return f"what is read is not in {error.encoding} (at byte {error.start}); convert it, with iconv say"
  if isinstance(error, UnicodeEncodeError) and error.encoding.lower().startswith("utf"):
    return f"a text or name has {error.object[error.start : error.start + 1]!a}, which is no character; remove it"
  if isinstance(error, UnicodeEncodeError):
    return (
      f"the output is in {error.encoding}, which has no {error.object[error.start : error.start + 1]!a}; set "
      "PYTHONIOENCODING=utf-8, or a locale such as LANG=C.UTF-8"
    )
  if isinstance(error, RecursionError):
    return "something is nested too deeply: a config, a JSON file or a chat template"
  text = str(error)
  if isinstance(error, ValueError) and text.startswith("embedded null"):
    return "a path or name has a NUL in it; remove it"
  if text.startswith("Unable to initialize backend") or re.search("for (environment|JAX flag) ", text):
    return f"{one_line(text.splitlines()[0], 300)}; mend the environment variable (JAX_PLATFORMS, JAX_…)"
  if isinstance(error, AssertionError) and _raised_by(error, "jax/_src/xla_bridge.py"):
    return f"JAX has no device of JAX_PLATFORMS={environment.text('JAX_PLATFORMS')}; unset it, or install what it needs"
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
    what = one_line(text.splitlines()[0] if text else "", 200)
    return f"out of memory{f' ({what})' if what else ''}; use a smaller batch, context or model, or a larger machine"
  if isinstance(error, OSError) and error.filename == "stdout":
    return explain(error, "cannot write")
  if isinstance(error, Exception) and (line := explain(error)) is not None:
    more = "" if isinstance(error, OSError) else f" ({type(error).__name__}: {one_line(text, 160)})"
    return line + more
  return one_line(text, 300) if isinstance(error, OSError) else None


def _raised_by(error: BaseException, file: str) -> bool:
  """Whether it is a file whose code has raised an error."""
  frames = traceback.extract_tb(error.__traceback__)
  return bool(frames) and frames[-1].filename.endswith(file)


def _to_nowhere(stream: TextIO) -> None:
  """What is still to be written goes nowhere; Python would fail once more at the end."""
  try:
    stream.flush()
  except (OSError, ValueError):
    with contextlib.suppress(OSError, ValueError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave(error: BaseException, code: int, line: str | None = None) -> None:
  """`hosts.leave`, where a job was joined: until then there is none, and jax need not start for an error."""
  if "jaxllm.parallel.hosts" in sys.modules:
    from jaxllm.parallel import hosts

    hosts.leave(error, code, line)


class _Parser(argparse.ArgumentParser):
  """Says what is wrong as everything else does: one line, without the usage, which is long."""

  def error(self, message: str) -> NoReturn:
    raise ConfigError(f"{message} ({self.prog} --help says more)")


def door_parser(door: str, doc: str, epilog: str = "") -> argparse.ArgumentParser:
  """The parser of a door; it raises ConfigError for words that it does not take."""
  parser = _Parser(
    prog=f"python -m jaxllm.{door}",
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=epilog,
    allow_abbrev=False,
  )
  parser.add_argument("--debug", action="store_true", help="show a traceback where an error is reported")
  return parser


def add_model(parser: argparse.ArgumentParser, flag: str = "--model", **options: Any) -> None:
  """Lets a door read a model of any form."""
  parser.add_argument(flag, required=True, type=path_argument, metavar="PATH", help=MODEL_FORMS, **options)
  parser.add_argument(
    "--adapter",
    type=weighted_adapter,
    action="append",
    metavar="DIR",
    help="a LoRA or DoRA adapter in PEFT's form; may be repeated; DIR:0.5 takes half of it",
  )
  parser.add_argument("--step", type=int, metavar="N", help="of a run: this checkpoint (default: the latest)")


def path_argument(text: str) -> Path:
  """`local_path` for a parser, which says of which argument an error is."""
  try:
    return local_path(text)
  except ConfigError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def weighted_adapter(text: str) -> Path | tuple[Path, float]:
  """An adapter's directory, with its weight where the text ends in a colon and a number."""
  directory, _, weight = text.rpartition(":")
  try:
    share = float(weight) if directory else None
  except ValueError:
    share = None
  if share is None:
    return path_argument(text)
  if not math.isfinite(share):
    raise argparse.ArgumentTypeError(f"the weight of {text} must be a finite number")
  return path_argument(directory), share


def config_parser(door: str, doc: str, *, workdir: bool = True) -> argparse.ArgumentParser:
  """The parser of a door that takes a config file; parse with `parse_config_args`."""
  epilog = "Any key of the config can be set: --config.training.steps=100 --config.optimizer.learning_rate=1e-3"
  parser = door_parser(door, doc, epilog)
  parser.add_argument("--config", required=True, metavar="FILE", help="a config file, like configs/quickstart.py")
  if workdir:
    parser.add_argument(
      "--workdir", type=path_argument, metavar="DIR", help="the run directory (default: runs/<config name>)"
    )
  return parser


def parse_config_args(
  parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[tuple[str, Any]]]:
  """Splits --config.KEY=VALUE (or --config.KEY VALUE) overrides from the other arguments."""
  overrides, rest, words = [], [], list(argv)
  while words:
    word = words.pop(0)
    if not word.startswith("--config."):
      rest.append(word)
      continue
    key, equals, value = word.removeprefix("--config.").partition("=")
    if not equals:
      if not words or words[0].startswith("--"):
        parser.error(f"{word} needs a value: {word}=VALUE")
      value = words.pop(0)
    overrides.append((key, value))
  return parser.parse_args(rest), overrides


def print_config(config: Any) -> None:
  """Prints every key of a dataclass of settings with its value, one `config.KEY=VALUE` a line."""
  for key, value in settings.keys(config):
    print(f"config.{key}={value!r}")
