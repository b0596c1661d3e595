"""Guard rails of whole runs: what they forget is measured, they end early, and say when memory does not suffice."""

import dataclasses
import json
import re

import jax
import pytest

from jaxllm.config import load_config
from jaxllm.training import loop
from jaxllm.training.loop import train


def run(job, directory, **keys):
  return train(load_config(str(job), list({"optimizer.schedule": "constant", **keys}.items())), directory)


def figures(directory, metric):
  rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
  found = [(row["step"], row[metric]) for row in rows if metric in row]
  assert len(dict(found)) == len(found), "a step is there twice"
  return dict(found)


@pytest.fixture(scope="module")
def data(job):
  return load_config(str(job), []).data.dir


REPLAY = {"training.eval_every": 2}


def test_a_replay_set_is_measured_from_step_0_on(job, data, tmp_path):
  """On the run's own held-out data it is its held-out loss; step 0 is the model that it began with."""
  base = run(job, tmp_path / "base")
  more = {"model_init.path": str(tmp_path / "base"), "training.replay_dir": data, **REPLAY}
  run(job, tmp_path / "tuned", **more)
  replay, heldout = (figures(tmp_path / "tuned", f"{name}/loss") for name in ("replay", "eval"))
  assert list(replay) == [0, 2, 4, 6] and list(heldout) == [2, 4, 6]
  assert replay == {0: replay[0], **heldout}
  assert replay[0] == pytest.approx(base["eval/loss"], rel=1e-6) and replay[6] != replay[0]
  bytes_ = [figures(tmp_path / "tuned", f"{name}/bits_per_byte")[6] for name in ("replay", "eval")]
  assert bytes_[0] == bytes_[1]
  for steps in (3, 6):
    run(job, tmp_path / "parts", **more, **{"training.steps": steps})
  assert {k: v for k, v in figures(tmp_path / "parts", "replay/loss").items() if k != 3} == replay


def test_a_run_that_forgets_is_stopped(job, data, tmp_path, door, caplog):
  flags = [f"--config={job}", f"--workdir={tmp_path / 'run'}", f"--config.training.replay_dir={data}"]
  flags += ["--config.training.eval_every=2", "--config.optimizer.learning_rate=3.0"]
  for _ in range(2):  # a run that goes on says the same
    code, out, err = door("train", *flags, "--config.training.replay_limit=0.01")
    assert code == 2 and "error: the run forgets: at step 2 its loss on training.replay_dir is" in err, (out, err)
    assert "training.replay_limit is 0.01" in err and "Step 2 is saved in" in err and err.count("error") == 1
    assert list(figures(tmp_path / "run", "replay/loss")) == [0, 2]
    assert (tmp_path / "run" / "checkpoints" / "2" / "manifest.json").exists()
  warn = ["--config.training.replay_limit=0.01", "--config.training.on_forgetting=warn"]
  code, out, err = door("train", *flags, *warn)
  assert code == 0 and list(figures(tmp_path / "run", "replay/loss")) == [0, 2, 4, 6]
  assert re.search(r"replay: loss [\d.]+, .* \(\+[\d.]+ since step 0\)", out)
  assert sum("the run forgets: at step" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("more", [{}, {"objective.cache_reference": True}], ids=["direct", "cached"])
def test_what_preferences_make_forget_of_other_text(chat_job, tmp_path, door, more):
  """Beside the margins the loss on the words of conversations, which is that of a causal model on them."""
  flags = [chat_job, f"--config.data.dir={tmp_path / 'chat'}"]
  assert door("prepare", *flags)[0] == 0
  code, _, err = door("train", *flags, f"--workdir={tmp_path / 'base'}", "--config.training.steps=2")
  assert code == 0, err
  rows = [{"prompt": f"{n}+1?", "chosen": f"it is {n + 1}", "rejected": f"no {n + 2}"} for n in range(40)]
  (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
  keys = {"data.task": "preference", "data.packing": "none", "objective.name": "dpo", "peft.kind": "lora"} | more
  keys |= {"model_init.path": tmp_path / "base", "training.replay_dir": tmp_path / "chat"}
  keys |= {"data.sources.0": {"kind": "jsonl", "path": str(tmp_path / "pairs.jsonl")}}
  flags = [chat_job, *(f"--config.{name}={value}" for name, value in keys.items())]
  code, _, err = door("prepare", *flags)
  assert code == 0, err
  code, out, err = door("train", *flags, f"--workdir={tmp_path / 'run'}")
  assert code == 0, err
  [before] = figures(tmp_path / "base", "eval/loss").values()
  replay = figures(tmp_path / "run", "replay/loss")
  assert replay[0] == pytest.approx(before, rel=1e-5) and list(replay) == [0, 6] and replay[6] != replay[0]
  assert figures(tmp_path / "run", "eval/rewards/margins").keys() == {6}


def test_replay_sets_that_cannot_be(job, data, tmp_path, corpus, door):
  flags = [f"--config={job}", f"--workdir={tmp_path / 'run'}"]
  code, _, err = door("train", *flags, f"--config.training.replay_dir={tmp_path / 'none'}")
  assert code == 2 and err.startswith("error: no prepared data in ")
  other = [f"--config.data.dir={tmp_path / 'other'}", "--config.data.tokenizer.vocab_size=290"]
  assert door("prepare", f"--config={job}", *other)[0] == 0
  code, _, err = door("train", *flags, f"--config.training.replay_dir={tmp_path / 'other'}")
  assert code == 2 and "was prepared with another tokenizer than" in err and len(err.splitlines()) == 1


STOPPING = {
  "training.steps": 8,
  "training.eval_every": 1,
  "training.early_stopping.patience": 2,
  "training.early_stopping.mode": "max",  # the wrong way round, so that the first evaluation stays the best
  "checkpoint.keep_last": 1,
}


def test_early_stopping(job, tmp_path, capsys):
  """The same whether interrupted or not, and the best step stays on disk although others are newer."""
  result = run(job, tmp_path / "whole", **STOPPING)
  assert result["step"] == 3 and not result["stopped"]
  out = capsys.readouterr().out
  assert "stopping early at step 3, after 2 evaluations without an improvement: eval/loss is" in out
  assert "the best step is 1, which is kept" in out
  best = json.loads((tmp_path / "whole" / "best.json").read_text())
  assert best == {"step": 1, "metric": "eval/loss", "value": figures(tmp_path / "whole", "eval/loss")[1]}
  assert sorted(p.name for p in (tmp_path / "whole" / "checkpoints").iterdir()) == ["1", "3"]
  for steps in (1, 2, 8, 8):
    result = run(job, tmp_path / "parts", **STOPPING | {"training.steps": steps})
    assert result["step"] == min(steps, 3)
  for metric in ("loss", "eval/loss"):
    assert figures(tmp_path / "parts", metric) == figures(tmp_path / "whole", metric)
  assert json.loads((tmp_path / "parts" / "best.json").read_text()) == best
  assert sorted(p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()) == ["1", "3"]
  # With more patience it goes on.
  assert run(job, tmp_path / "parts", **STOPPING | {"training.early_stopping.patience": 9})["step"] == 8


@pytest.mark.parametrize(
  "keys, message",
  [
    ({"metric": "eval/f1"}, "'eval/f1' is not measured; there are eval/accuracy, eval/loss, eval/perplexity"),
    ({"metric": "replay/loss"}, "'replay/loss' is not measured"),
    ({"patience": -1}, "must not be negative"),
  ],
)
def test_early_stopping_that_cannot_be(job, tmp_path, keys, message):
  from jaxllm.base.errors import ConfigError

  keys = {f"training.early_stopping.{name}": value for name, value in keys.items()}
  with pytest.raises(ConfigError, match=message):
    run(job, tmp_path, **STOPPING | {"training.early_stopping.mode": "auto"} | keys)


class Exhausted:
  """A compiled step for which there is no memory from the nth call on; the first is the rehearsal."""

  def __init__(self, compiled, calls):
    self.compiled, self.calls = compiled, calls

  def memory_analysis(self):
    return self.compiled.memory_analysis()

  def __call__(self, *arguments):
    self.calls -= 1
    if self.calls < 0:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 34359738368 bytes.\nmore lines")
    return self.compiled(*arguments)


class Step:
  """`program.step` that compiles to that; with no calls at all it does not even compile."""

  def __init__(self, step, calls):
    self.step, self.calls = step, calls

  def lower(self, *arguments):
    if self.calls is None:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in hbm")
    self.lowered = self.step.lower(*arguments)
    return self

  def compile(self):
    return Exhausted(self.lowered.compile(), self.calls)


@pytest.mark.parametrize("calls", [None, 0, 4])
def test_out_of_memory(job, tmp_path, monkeypatch, calls, door):
  """One line that says what takes the memory, what would take less, and from where the run goes on, as it then does."""
  make = loop.make_program
  whole = run(job, tmp_path / "whole", **{"checkpoint.every": 1})

  def short(*arguments):
    program = make(*arguments)
    return dataclasses.replace(program, step=Step(program.step, calls))

  monkeypatch.setattr(loop, "make_program", short)
  flags = [f"--config={job}", f"--workdir={tmp_path / 'run'}", "--config.checkpoint.every=1"]
  flags += ["--config.optimizer.schedule=constant"]
  code, _, err = door("train", *flags)
  assert code == 2 and err.count("\n") == 1, err
  assert "out of memory: the run needs" in err and "optimizer" in err and "RESOURCE_EXHAUSTED" in err
  ways = re.findall(r"--config\.(\S+?)=", err)
  assert ways == ["training.accumulation", "compute.remat", "peft.kind"]
  assert len(re.findall(r"\(about [\d.]+ MiB less\)", err)) == (1 if calls is None else 3)
  assert ("step 3 is saved in" if calls == 4 else "nothing is saved yet") in err
  monkeypatch.setattr(loop, "make_program", make)
  code, out, err = door("train", *flags, "--config.training.accumulation=2")
  assert code == 0, err
  assert figures(tmp_path / "run", "loss") == pytest.approx(figures(tmp_path / "whole", "loss"), rel=1e-4)
  assert whole["step"] == 6
