"""Signals, progress, the start-up table and profiles: what surrounds the loop."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from rich.console import Console

import jaxllm.training.meter as meter_module
from jaxllm.models.config import ModelConfig
from jaxllm.training.config import ProfileConfig
from jaxllm.training.meter import Meter
from jaxllm.training.profiling import Profiler
from jaxllm.training.progress import Lasting, Progress, print_table, progress_line, short_number
from jaxllm.training.signals import StopRequest


def test_the_first_signal_asks_and_the_handlers_come_back():
  before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  for number in before:
    with StopRequest() as stop:
      assert not stop.requested
      signal.raise_signal(number)
      assert stop.requested
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_second_ctrl_c_interrupts_at_once():
  with pytest.raises(KeyboardInterrupt), StopRequest():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def test_two_kinds_at_once_are_one_request_and_later_ones_insist(monkeypatch):
  now = [0.0]
  monkeypatch.setattr("jaxllm.base.stopping.time.monotonic", lambda: now[0])
  with StopRequest() as stop:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert stop.requested
    now[0] = 5.0
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)


def test_what_was_ignored_stays_so_but_sigterm():
  numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
  before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
  try:
    with StopRequest() as stop:
      signal.raise_signal(signal.SIGINT)
      signal.raise_signal(signal.SIGHUP)
      assert not stop.requested
      signal.raise_signal(signal.SIGTERM)
      assert stop.requested
    assert {signal.getsignal(number) for number in numbers} == {signal.SIG_IGN}
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def test_usr1_is_counted_and_stops_nothing():
  with StopRequest() as stop:
    before = stop.saves
    signal.raise_signal(signal.SIGUSR1)
    assert stop.saves == before + 1 and not stop.requested


def test_a_progress_that_nobody_can_see_ends_nothing(capfd):
  with open("/dev/full", "w") as stream:
    console = Console(file=Lasting(stream))
    for _ in range(3):
      console.print("step 1")
  said = capfd.readouterr().err.splitlines()
  (line,) = said
  assert line.startswith("progress is shown no more (the disk is full; free some space") and line.endswith("goes on")


def test_in_another_thread_nothing_is_installed():
  before = signal.getsignal(signal.SIGTERM)
  seen = []

  def work():
    with StopRequest() as stop:
      seen.append((signal.getsignal(signal.SIGTERM), stop.requested))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [(before, False)]


@pytest.mark.parametrize("signals, code", [(["TERM"], 0), (["INT"], 0), (["TERM", "TERM"], -signal.SIGTERM)])
def test_exit_codes_of_a_process_that_is_told_to_stop(signals, code):
  script = """
    from jaxllm.training.signals import StopRequest
    import sys, time
    with StopRequest() as stop:
      print("ready", flush=True)
      while not stop.requested:
        time.sleep(0.01)
      print("saving", flush=True)
      if sys.argv[1] == "2":
        time.sleep(60)
  """
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(script), str(len(signals))],
    env=os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  for name, line in zip(signals, ("ready\n", "saving\n")):
    assert process.stdout.readline() == line
    process.send_signal(getattr(signal, f"SIG{name}"))
  _, errors = process.communicate(timeout=60)
  assert process.returncode == code
  assert errors.count("stopping after this step") == 1


METRICS = {"loss": 2.34567, "tokens_per_second": 18234.0, "mfu": 0.4127, "step_time_s": 0.5, "eval/loss": 2.5}


def test_the_line():
  assert progress_line(120, 1000, METRICS) == (
    "step 120/1000  loss 2.3457  eval 2.5000  18.2k tokens/s  MFU 41.3%  ETA 0:07:20"
  )
  assert progress_line(0, 10, {"step_time_s": 3600 * 3.0}) == "step 0/10  ETA 30:00:00"


@pytest.mark.parametrize(
  "value, text",
  [(0, "0"), (9.5, "9.5"), (950, "950"), (999.7, "1k"), (1000, "1k"), (18234, "18.2k"), (123456, "123k"),
   (1.54e6, "1.54M"), (7e15, "7P"), (7e18, "7000P")],
)  # fmt: skip
def test_short_numbers(value, text):
  assert short_number(value) == text


def test_plain_lines_without_a_terminal():
  file = io.StringIO()
  with Progress(1000, Console(file=file)) as progress:
    for step in range(1, 21):
      progress.update(step, METRICS if step % 10 == 0 else None)
    progress.say("saved [step 20]")
  lines = file.getvalue().splitlines()
  assert lines == [progress_line(10, 1000, METRICS), progress_line(20, 1000, METRICS), "saved [step 20]"]


def test_one_live_line_on_a_terminal():
  file = io.StringIO()
  with Progress(40, Console(file=file, force_terminal=True, width=120)) as progress:
    progress.update(10, METRICS)
    progress.say("saved")
    progress.update(20)
  text = file.getvalue()
  assert "step 10/40" in text and "step 20/40  loss 2.3457" in text and "━" in text
  assert "saved\n" in text and text.count("\n") == 2, "what was said and the end, nothing else scrolls"


def test_the_table_keeps_long_values_on_one_line_in_a_log():
  file = io.StringIO()
  long = "6 x 123,532,032 weights + 12 x 12 layers x 768 wide x 512.5 keys [of 1024]" * 2
  print_table([("parameters", "10.7M"), ("FLOPs per token", long)], "plan", Console(file=file))
  lines = [line.strip() for line in file.getvalue().splitlines() if line.strip()]
  assert lines[0] == "plan"
  assert [line.split(maxsplit=1) for line in lines[1:2]] == [["parameters", "10.7M"]]
  assert lines[2].startswith("FLOPs per token") and lines[2].endswith(long)


def test_only_the_first_process_shows_anything(monkeypatch, capsys):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with Progress(10) as progress:
    progress.update(1, METRICS)
    progress.say("saved")
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize("at_once", [True, False], ids=["computes when dispatched", "computes later"])
def test_steps_are_timed_by_when_they_end(at_once, monkeypatch):
  """Whichever way the devices work, and right after a pause too, where the loop waits twice and then not at all."""
  clock = types.SimpleNamespace(now=0.0)
  monkeypatch.setattr(meter_module.time, "monotonic", lambda: clock.now)
  program = types.SimpleNamespace(
    tokens_per_step=600,
    model=ModelConfig(),
    row_lengths=(8,),
    mesh=Mesh(jax.devices()[:1], "x"),
    trains_weights=True,
  )
  pending = []

  def compute(result):  # each step takes 6 seconds
    for step in pending:
      if not step.done and (step is result or at_once):
        clock.now, step.done = clock.now + 6, True
    return result

  monkeypatch.setattr(meter_module.jax, "block_until_ready", compute)
  rates = []
  with Meter(program) as meter:
    meter._waiter = types.SimpleNamespace(submit=lambda wait: Lazy(wait, at_once), shutdown=lambda **_: None)
    for step in range(1, 7):
      pending.append(types.SimpleNamespace(done=False))
      meter.dispatched(pending[-1])
      if step in (1, 4):  # the first after a pause
        continue
      meter.finished()
      rates.append(meter.rates()["tokens_per_second"])
      if step == 3:
        meter.finished()
        rates.append(meter.rates()["tokens_per_second"])
        with meter.pause():
          clock.now += 1000
  assert rates == [100.0] * 5


class Lazy:
  """A future that computes when it is asked, or at once."""

  def __init__(self, compute, at_once):
    self.result = (lambda value: lambda: value)(compute()) if at_once else compute


def test_a_trace_of_the_chosen_steps(tmp_path, monkeypatch):
  calls, done = [], []
  start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
  monkeypatch.setattr(jax.profiler, "start_trace", lambda d: (calls.append(len(done)), start(d)))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (calls.append(len(done)), stop()))
  step = jax.jit(lambda x: x @ x)
  state = jnp.eye(64)
  with Profiler(ProfileConfig(steps=2, start=3), tmp_path) as profiler:
    while len(done) < 8:
      profiler.before_step()
      state = step(state)
      profiler.after_step(state)
      done.append(state)
  assert calls == [3, 4]
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_trace_is_closed_when_the_run_ends_early(tmp_path):
  with Profiler(ProfileConfig(steps=5, start=0), tmp_path) as profiler:
    profiler.before_step()
    profiler.after_step(jnp.ones(3))
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  jax.profiler.start_trace(str(tmp_path / "again"))  # raises if the first were still running
  jax.profiler.stop_trace()


def test_no_trace_unless_asked(tmp_path):
  with Profiler(ProfileConfig(start=0), tmp_path) as profiler:
    profiler.before_step()
    profiler.after_step(None)
  assert not (tmp_path / "profile").exists()
