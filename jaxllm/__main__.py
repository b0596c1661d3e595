"""`jaxllm COMMAND …`, the same as `python -m jaxllm.COMMAND …`."""

import importlib
import sys
from collections.abc import Sequence

from jaxllm.base.errors import ConfigError
from jaxllm.cli import run_door

COMMANDS = {
  "prepare": "corpus -> tokenizer -> shards",
  "train": "train a model from a config",
  "generate": "write text with a model",
  "bench": "how fast a model reads and writes",
  "evaluate": "held-out bits per byte of a model",
  "convert": "a model from one form to another: jaxllm, Hugging Face, GGUF",
}


def main() -> int:
  """Hands the rest of the command line to the door it names."""
  argv = sys.argv[1:]
  if not argv or argv[0] not in COMMANDS:
    return run_door(say_commands, argv)
  door = importlib.import_module(f"jaxllm.{argv[0]}")
  return run_door(door.main, argv[1:])


def say_commands(argv: Sequence[str]) -> int:
  """Prints what there is; exit code 2 where something else was asked for."""
  print("usage: jaxllm COMMAND [--help] …\n\ncommands:")
  for name, what in COMMANDS.items():
    print(f"  {name:10} {what}")
  if argv and argv[0] not in ("-h", "--help"):
    raise ConfigError(f"no command {argv[0]!r}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
