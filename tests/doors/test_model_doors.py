"""What is done with a trained run: evaluate, generate, load in Python."""

import json
import math
import zlib

import numpy as np
import pytest


@pytest.fixture(scope="module")
def run(job, tmp_path_factory):
  from jaxllm.cli import run_door
  from jaxllm.train import main

  directory = tmp_path_factory.mktemp("runs") / "tiny"
  assert run_door(main, [f"--config={job}", f"--workdir={directory}", "--config.training.eval_batches=0"]) == 0
  return directory


def last_metrics(run):
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  return {key: value for row in rows for key, value in row.items()}


def test_evaluate_agrees_with_the_training_run_and_with_gzip(door, run, job):
  code, out, err = door("evaluate", f"--model={run}", "--baselines", "--json")
  assert code == 0, err
  result = json.loads(out)
  assert result["eval/bits_per_byte"] == pytest.approx(last_metrics(run)["eval/bits_per_byte"], rel=1e-4)
  heldout = next(job.parent.glob("data/build-*/heldout.bin")).read_bytes()
  assert result["baselines/gzip -9"] == pytest.approx(8 * len(zlib.compress(heldout, 9, 31)) / len(heldout))
  assert 0 < result["baselines/byte 6-gram"] < 8


def test_evaluate_prints_a_table(door, run):
  code, out, _ = door("evaluate", f"--model={run}", "--baselines")
  assert code == 0
  for name in ("this model", "gzip -9", "xz -9e", "byte 6-gram"):
    assert name in out


def test_load_model_gives_the_logits_that_the_loss_comes_from(run, job):
  import jaxllm

  model = jaxllm.load_model(run)
  text = "abc def " * 3
  ids = model.tokenizer.encode(text)
  logits = np.asarray(model(np.asarray(ids)[None]), np.float64)[0]
  nll = [math.log(np.exp(row - row.max()).sum()) + row.max() - row[target] for row, target in zip(logits, ids[1:])]
  batch = {
    "inputs": np.asarray(ids[:-1], np.int32)[None],
    "targets": np.asarray(ids[1:], np.int32)[None],
    "loss_weights": np.ones((1, len(ids) - 1), np.float32),
  }
  total, weight = model.loss_sums(batch)
  assert float(total) == pytest.approx(sum(nll), rel=1e-5)
  assert float(weight) == len(ids) - 1


def test_generate_writes_text(door, run):
  code, out, err = door("generate", f"--model={run}", "--prompt=abc", "--max-tokens=5", "--temperature=0")
  assert code == 0, err
  assert out.strip()


BAD = [
  ("generate", ["--model=nowhere", "--prompt=a"], ["nowhere"]),
  ("evaluate", ["--model=nowhere"], ["nowhere"]),
  ("generate", ["--prompt=" + "word " * 500], ["limit", "64"]),
  ("generate", ["--prompt=a", "--step=777"], ["777"]),
  ("evaluate", ["--seq-len=100"], ["100", "64"]),
  ("evaluate", ["--data=nowhere"], ["nowhere", "jaxllm.prepare"]),
]


@pytest.mark.parametrize("name, flags, words", BAD, ids=[f"{name} {' '.join(flags)[:30]}" for name, flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(door, run, name, flags, words):
  flags = flags if any(flag.startswith("--model") for flag in flags) else [f"--model={run}", *flags]
  code, _, err = door(name, *flags)
  errors = [line for line in err.splitlines() if line.startswith("error: ")]
  assert code == 2 and len(errors) == 1, err
  for word in words:
    assert word in errors[0]


def test_a_tokenizer_of_another_corpus_is_refused(door, run, corpus, job, tmp_path):
  other = tmp_path / "other.py"
  data = tmp_path / "data"
  text = job.read_text().replace(repr(str(job.parent / "data")), repr(str(data)))
  other.write_text(text.replace("c.data.tokenizer.vocab_size = 300", "c.data.tokenizer.vocab_size = 290"))
  assert door("prepare", f"--config={other}")[0] == 0
  code, _, err = door("evaluate", f"--model={run}", f"--data={data}")
  assert code == 2 and "another tokenizer" in err


def test_the_command_lists_its_doors_and_refuses_others(capsys, monkeypatch):
  import jaxllm.__main__ as command

  for argv, code in ((["jaxllm", "--help"], 0), (["jaxllm", "dance"], 2)):
    monkeypatch.setattr("sys.argv", argv)
    assert command.main() == code
    out = capsys.readouterr().out
    assert all(name in out for name in ("prepare", "train", "generate", "evaluate"))
