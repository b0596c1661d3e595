"""What a person sees while a run goes on: one live line on a terminal, plain lines in a log."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

import jax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from jaxllm.base.os_errors import explain


class Lasting(io.TextIOBase):
  """A stream that nobody may read any more: a run goes on when its terminal is closed, a pipe ends or a disk is full.

  What cannot be shown goes, which is said once on stderr; metrics.jsonl has the figures.
  """

  def __init__(self, stream: TextIO):
    self._stream, self._lost = stream, False

  def write(self, text: str) -> int:
    self._attempt(lambda: self._stream.write(text))
    return len(text)

  def flush(self) -> None:
    self._attempt(self._stream.flush)

  def isatty(self) -> bool:
    return self._stream.isatty()

  def fileno(self) -> int:
    return self._stream.fileno()

  @property
  def encoding(self) -> str:  # type: ignore[override]
    """By which rich decides which lines it may draw."""
    return self._stream.encoding

  def _attempt(self, act: Callable[[], Any]) -> None:
    if self._lost:
      return
    try:
      act()
    except (OSError, ValueError) as error:  # ValueError: closed, or a character that the locale has not
      self._lost = not isinstance(error, UnicodeEncodeError)
      with contextlib.suppress(OSError):
        os.write(2, f"progress is shown no more ({explain(error) or error}); the run goes on\n".encode())
      if self._lost:
        with contextlib.suppress(OSError, ValueError):  # Python would fail on what is still to be written
          os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class Progress:
  """Shows step, loss, tokens/s, MFU and the time left; a context manager.

  On a terminal every `update` moves the live line; elsewhere only those that bring metrics print one. Of the processes
  of a run only the first shows anything.
  """

  def __init__(self, total: int, console: Console | None = None):
    self.total = total
    self.console = console or Console(file=Lasting(sys.stdout), quiet=jax.process_index() != 0)
    self._metrics: dict[str, float] = {}
    self._bar = None
    if self.console.is_terminal:
      self._bar = Bar(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),
        console=self.console,
        auto_refresh=False,
      )
      self._task = self._bar.add_task("starting", total=total)

  def __enter__(self) -> "Progress":
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *error) -> None:
    if self._bar:
      self._bar.stop()

  def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
    """`step` steps are done; `metrics` carries the names of metrics.jsonl, as far as there are any."""
    self._metrics.update(metrics or {})
    line = progress_line(step, self.total, self._metrics)
    if self._bar:
      self._bar.update(self._task, completed=step, description=line, refresh=True)
    elif metrics:
      self.say(line)

  def say(self, text: str) -> None:
    """Prints `text` above the live line."""
    self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def progress_line(step: int, total: int, metrics: Mapping[str, float]) -> str:
  """For example "step 120/1000  loss 2.3456  18.2k tokens/s  MFU 41.3%  ETA 0:12:05"."""
  parts = [f"step {step}/{total}"]
  if "loss" in metrics:
    parts.append(f"loss {metrics['loss']:.4f}")
  if "eval/loss" in metrics:
    parts.append(f"eval {metrics['eval/loss']:.4f}")
  if "tokens_per_second" in metrics:
    parts.append(f"{short_number(metrics['tokens_per_second'])} tokens/s")
  if "mfu" in metrics:
    parts.append(f"MFU {100 * metrics['mfu']:.1f}%")
  if "step_time_s" in metrics:
    minutes, seconds = divmod(round((total - step) * metrics["step_time_s"]), 60)
    parts.append(f"ETA {minutes // 60}:{minutes % 60:02}:{seconds:02}")
  return "  ".join(parts)


def short_number(value: float) -> str:
  """Three significant digits with a suffix: 950, 18.2k, 1.54M."""
  for suffix in ("", "k", "M", "G", "T", "P"):
    if abs(value) < 999.5 or suffix == "P":
      return (f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}") + suffix
    value /= 1000
  raise AssertionError


def print_table(rows: Iterable[tuple[str, str]], title: str = "", console: Console | None = None) -> None:
  """The table before step 0: one (name, value) a row; long values wrap on a terminal only."""
  console = console or Console(file=Lasting(sys.stdout))
  if not console.is_terminal:
    console = Console(file=console.file, width=200)
  table = Table(title=title or None, title_justify="left", box=box.SIMPLE, show_header=False, padding=(0, 1))
  table.add_column(style="bold", no_wrap=True)
  table.add_column(overflow="fold")
  for name, value in rows:
    table.add_row(Text(name), Text(value))
  console.print(table, highlight=False)
