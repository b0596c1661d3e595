"""Writes text with a model, or chats with it: `python -m jaxllm.generate --model=DIR --prompt=TEXT`."""

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxllm.base.errors import ConfigError, UserError
from jaxllm.base.files import local_path
from jaxllm.base.os_errors import file_errors
from jaxllm.base.stopping import Interrupted, interrupts_apart
from jaxllm.cli import add_model, door_parser, run_door

if TYPE_CHECKING:
  from jaxllm.inference.model import Message, Model, Prompt
  from jaxllm.inference.params import SamplingParams

MAX_PROMPT = 1 << 26  # characters; a pipe need not end
MAX_TOKENS, REPLY_TOKENS = 256, 1024  # of a text and of a reply, where neither the command nor the model says

EXAMPLES = """
examples:
  python -m jaxllm.generate --model=runs/quickstart --prompt="def " --max-tokens=64
  python -m jaxllm.generate --model=runs/quickstart --prompt="import " --num-samples=4 --seed=1
  python -m jaxllm.generate --model=my-model --prompt="One" --prompt="Two" --temperature=0 --stop=$'\\n'
  echo "Once upon a time" | python -m jaxllm.generate --model=my-model --prompt=-
  python -m jaxllm.generate --model=my-model                   (interactive: every line is a prompt)
  python -m jaxllm.generate --model=my-chat-model --system="You are a pirate." --prompt="Who are you?"
  python -m jaxllm.generate --model=my-chat-model              (a chat: /reset forgets it, /exit leaves)

A model with a chat template chats: prompts are messages to it, and --raw continues their text instead.
The text goes to stdout, everything else to stderr. Settings that are left out are the model's own, from its
generation_config.json.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The command line's settings."""
  what = "Continues prompts with a model, or chats with it; without a prompt it asks for one after the other."
  parser = door_parser("generate", what, EXAMPLES)
  add_model(parser)
  add = parser.add_argument
  add("--prompt", action="append", metavar="TEXT", help="what to continue; may be repeated; - reads stdin")
  add("--prompt-file", action="append", metavar="FILE", help="a file to continue; may be repeated")
  add("--system", metavar="TEXT", help="what a chat model is told before the chat")
  add("--raw", action="store_true", help="continue the text of prompts also with a chat model")
  add("--num-samples", type=int, default=1, dest="n", metavar="N", help="completions of each prompt (default: 1)")
  add(
    "--max-tokens",
    type=int,
    metavar="N",
    help=f"longest completion, in tokens (default: {MAX_TOKENS}, in a chat {REPLY_TOKENS})",
  )
  add("--temperature", type=float, metavar="T", help="0: always the most likely token (default: 1)")
  add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens only")
  add("--top-p", type=float, metavar="P", help="draw from the most likely tokens that make up P only")
  add("--min-p", type=float, metavar="P", help="draw from tokens at least P times the most likely one's")
  add("--num-beams", type=int, metavar="K", help="over 1: beam search, the likeliest text of K kept at once")
  add("--length-penalty", type=float, metavar="A", help="beam search: over 0 favours long texts (default: 1)")
  add("--early-stopping", action="store_true", default=None, help="beam search: end at the first K whole texts")
  add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
  add("--ignore-eos", action="store_true", default=None, help="write on past the end-of-text token")
  add("--seed", type=int, metavar="N", help="the same seed gives the same text (default: a new one)")
  add("--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: as the weights are stored)")
  add("--echo", action="store_true", help="print each prompt before its completion")
  return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
  """Runs the door; returns the exit code."""
  args = parse(argv)
  prompts = read_prompts(args)
  from jaxllm.inference.load import load_model
  from jaxllm.inference.params import SamplingParams

  names = {field.name for field in dataclasses.fields(SamplingParams)}
  settings = {name: value for name, value in vars(args).items() if name in names and value is not None}
  SamplingParams(**settings)  # a wrong setting is told before the model loads
  model = load_model(args.model, adapter=args.adapter, step=args.step, dtype=args.dtype)
  if args.raw and model.tokenizer is not None:
    model.tokenizer.end_of_turn_id = None  # its chat template, which would tell, is not run
  chats = not args.raw and model.tokenizer is not None and bool(model.tokenizer.chat_templates)
  if args.system is not None and not chats:
    raise ConfigError("--system is for a chat: the model has no chat template, or --raw turns it off")
  opening = [] if args.system is None else [{"role": "system", "content": args.system}]
  if not any(model.generation.get(name) for name in ("max_new_tokens", "max_tokens", "max_length")):
    settings.setdefault("max_tokens", REPLY_TOKENS if chats else MAX_TOKENS)
  sampling = model.sampling(**settings)
  if not prompts:
    with interrupts_apart():
      return interact(model, sampling, args.echo, opening if chats else None)
  asked: list[Prompt] = list(prompts)
  if chats:
    asked = [model.chat_ids([*opening, {"role": "user", "content": prompt}]) for prompt in prompts]
  shown = prompts if args.echo else [""] * len(prompts)
  if len(prompts) * sampling.n == 1:
    write_stream(model, asked[0], sampling, shown[0])
  else:
    write_all(model, asked, sampling, shown)
  return 0


def read_prompts(args: argparse.Namespace) -> list[str]:
  """The prompts of the command line, files and stdin; none means the interactive mode.

  Raises:
    ConfigError: a file that cannot be read.
  """
  prompts = []
  for prompt in args.prompt or ():
    if prompt == "-":
      with file_errors("stdin", kind=ConfigError):
        prompt = _not_endless(sys.stdin.read(MAX_PROMPT + 1)).removesuffix("\n")
    prompts.append(prompt)
  for name in args.prompt_file or ():
    with file_errors(name, "cannot read the prompt file", ConfigError):
      try:
        with local_path(name).open(encoding="utf-8") as file:
          prompts.append(_not_endless(file.read(MAX_PROMPT + 1)))
      except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the prompt file {name}: it is not in UTF-8") from error
  return prompts


def _not_endless(text: str) -> str:
  if len(text) > MAX_PROMPT:
    raise ConfigError(f"a prompt has over {MAX_PROMPT >> 20} Mi characters, which no model reads; shorten it")
  return text


def _next_line(terminal: bool) -> str:
  """What is asked next. Raises EOFError where the input ends."""
  if terminal:
    return input("> ")
  with file_errors("stdin", kind=ConfigError):
    line = _not_endless(sys.stdin.readline(MAX_PROMPT + 1))
  if not line:
    raise EOFError
  return line.removesuffix("\n")


def write_stream(
  model: "Model", prompt: "Prompt", sampling: "SamplingParams", before: str = "", said: list[str] | None = None
) -> None:
  """Prints `before` and a completion while it is drawn, then its speed; `said` gathers the text."""
  speed, deltas = Speed(), model.stream(prompt, sampling)
  print(before, end="", flush=True)
  try:
    for delta in deltas:
      print(delta.text, end="", flush=True)
      speed.add(len(delta.token_ids))
      if said is not None:
        said.append(delta.text)
  finally:  # an interrupted text ends its line too
    print(flush=True)
  speed.report()


def write_all(model: "Model", prompts: list["Prompt"], sampling: "SamplingParams", before: list[str]) -> None:
  """Prints the completions of several prompts, or several of one, each under a line that names it."""
  speed = Speed()
  done = {}
  for delta in model.stream(prompts, sampling):
    speed.add(len(delta.token_ids))
    if delta.completion is not None:
      done[delta.prompt_index, delta.index] = delta.completion
  for (prompt, sample), completion in sorted(done.items()):
    name = f"prompt {prompt + 1}" if len(prompts) > 1 else ""
    name += f"{', ' if name else ''}sample {sample + 1}" if sampling.n > 1 else ""
    print(f"--- {name}")
    print(before[prompt] + completion.text)
  sys.stdout.flush()
  speed.report()


def interact(model: "Model", sampling: "SamplingParams", echo: bool, opening: list["Message"] | None) -> int:
  """Reads lines until the input ends; each is a prompt, or in a chat the next message.

  Args:
    opening: the messages with which a chat begins; None: no chat.
  """
  if opening is not None and sampling.n > 1:
    raise ConfigError("a chat goes on from one reply; leave --num-samples out or give a --prompt")
  terminal = sys.stdin.isatty()
  if terminal:
    with contextlib.suppress(ImportError):  # Windows has none
      import readline  # noqa: F401  (gives input() a history)
    what = "a prompt" if opening is None else "a message; /reset forgets the chat, /exit leaves"
    print(f"Every line is {what}. Ctrl-C stops a text, Ctrl-D ends.", file=sys.stderr)
  history = list(opening or ())
  failed = False
  while True:
    try:
      line = _next_line(terminal)
    except EOFError:
      print(file=sys.stderr)
      return 2 if failed and not terminal else 0
    except Interrupted:  # SIGTERM
      raise
    except KeyboardInterrupt:
      if not terminal:
        raise
      print("\nCtrl-D ends.", file=sys.stderr)
      continue
    if not line:
      continue
    before = line if echo else ""
    try:
      if opening is not None:
        if line == "/exit":
          return 2 if failed and not terminal else 0
        if line == "/reset":
          history = list(opening)
          print("a new chat", file=sys.stderr)
        else:
          reply(model, history, line, sampling, before)
      elif sampling.n == 1:
        write_stream(model, line, sampling, before)
      else:
        write_all(model, [line], sampling, [before])
    except Interrupted:
      raise
    except KeyboardInterrupt:
      print("stopped", file=sys.stderr)
    except UserError as error:  # this prompt's mistake; the next one may be fine
      failed = True
      advice = " (/reset does)" if isinstance(error, ConfigError) and history != opening and history else ""
      print(f"error: {error}{advice}", file=sys.stderr)


def reply(model: "Model", history: list["Message"], line: str, sampling: "SamplingParams", before: str) -> None:
  """Prints the reply to a message; both join the history, also where Ctrl-C cut the reply short."""
  said: list[str] = []
  asked = [*history, {"role": "user", "content": line}]
  try:
    write_stream(model, model.chat_ids(asked), sampling, before, said)
  finally:
    if said:
      history[:] = [*asked, {"role": "assistant", "content": "".join(said)}]


class Speed:
  """Tokens per second of a generation; the first dispatch, which may compile, is told apart."""

  def __init__(self):
    self._start, self._first, self._tokens = time.monotonic(), None, 0

  def add(self, tokens: int) -> None:
    """Counts tokens that have just arrived."""
    if self._first is None:
      self._first = time.monotonic()
    self._tokens += tokens

  def report(self) -> None:
    """Prints the figures to stderr."""
    seconds = time.monotonic() - self._start
    first = seconds if self._first is None else self._first - self._start
    print(
      f"{self._tokens} tokens in {seconds:.2f} s, {self._tokens / seconds:.1f} tokens/s "
      f"(the first after {first:.2f} s)",
      file=sys.stderr,
    )


if __name__ == "__main__":
  sys.exit(run_door(main))
