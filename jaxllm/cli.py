"""What the doors share: reading `--config`, reporting errors, exit codes."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxllm.base import settings
from jaxllm.base.errors import UserError
from jaxllm.base.files import local_path

MODEL_FORMS = "a model directory, training run, Hugging Face directory, LoRA adapter or .gguf file"


def run_door(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
  """Runs a door's `main(argv)`; a UserError becomes one line and exit code 2, a traceback with --debug.

  In a job of several processes an error does not return: it ends this process at once, and the others with it.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  debug = "--debug" in argv
  argv = [a for a in argv if a != "--debug"]
  logging.basicConfig(format="%(message)s", level=logging.WARNING)
  logging.getLogger("jaxllm").setLevel(logging.INFO)
  logging.getLogger("absl").setLevel(logging.ERROR)
  try:
    return main(argv) or 0
  except UserError as error:
    leave(error, 2, None if debug else f"error: {error}")
    if debug:
      raise
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt as error:
    leave(error, 130, "stopped")
    print("stopped", file=sys.stderr)
    return 130
  except BrokenPipeError as error:
    leave(error, 1, "error: nobody reads the output")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except OSError as error:
    line = f"error: {error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    leave(error, 2, None if debug else line)
    if debug:
      raise
    print(line, file=sys.stderr)
    return 2
  except BaseException as error:
    leave(error, 1)
    raise


def leave(error: BaseException, code: int, line: str | None = None) -> None:
  """`hosts.leave`, where a job was joined: until then there is none, and jax need not start for an error."""
  if "jaxllm.parallel.hosts" in sys.modules:
    from jaxllm.parallel import hosts

    hosts.leave(error, code, line)


def door_parser(door: str, doc: str, epilog: str = "") -> argparse.ArgumentParser:
  """The parser of a door."""
  parser = argparse.ArgumentParser(
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
  parser.add_argument(flag, required=True, metavar="PATH", help=MODEL_FORMS, **options)
  parser.add_argument(
    "--adapter",
    type=weighted_adapter,
    action="append",
    metavar="DIR",
    help="a LoRA or DoRA adapter in PEFT's form; may be repeated; DIR:0.5 takes half of it",
  )
  parser.add_argument("--step", type=int, metavar="N", help="of a run: this checkpoint (default: the latest)")


def weighted_adapter(text: str) -> Path | tuple[Path, float]:
  """An adapter's directory, with its weight where the text ends in a colon and a number."""
  directory, _, weight = text.rpartition(":")
  try:
    return (local_path(directory), float(weight)) if directory else local_path(text)
  except ValueError:
    return local_path(text)


def config_parser(door: str, doc: str, *, workdir: bool = True) -> argparse.ArgumentParser:
  """The parser of a door that takes a config file; parse with `parse_config_args`."""
  epilog = "Any key of the config can be set: --config.training.steps=100 --config.optimizer.learning_rate=1e-3"
  parser = door_parser(door, doc, epilog)
  parser.add_argument("--config", required=True, metavar="FILE", help="a config file, like configs/quickstart.py")
  if workdir:
    parser.add_argument(
      "--workdir", type=local_path, metavar="DIR", help="the run directory (default: runs/<config name>)"
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
