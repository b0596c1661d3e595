"""What a person sees while a run goes on: one live line on a terminal, plain lines in a log."""

from collections.abc import Iterable, Mapping

import jax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text


class Progress:
  """Shows step, loss, tokens/s, MFU and the time left; a context manager.

  On a terminal every `update` moves the live line; elsewhere only those that bring metrics print one. Of the processes
  of a run only the first shows anything.
  """

  def __init__(self, total: int, console: Console | None = None):
    self.total = total
    self.console = console or Console(quiet=jax.process_index() != 0)
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
  console = console or Console()
  if not console.is_terminal:
    console = Console(file=console.file, width=200)
  table = Table(title=title or None, title_justify="left", box=box.SIMPLE, show_header=False, padding=(0, 1))
  table.add_column(style="bold", no_wrap=True)
  table.add_column(overflow="fold")
  for name, value in rows:
    table.add_row(Text(name), Text(value))
  console.print(table, highlight=False)
