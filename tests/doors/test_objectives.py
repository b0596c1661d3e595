"""Every objective through the real door, on a tiny part of the standard library: it learns, and resumes exactly."""

import json
import sysconfig
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
LIB = sysconfig.get_paths()["stdlib"]
TEXT = [{"path": f"{LIB}/json/*.py", "name": "json"}]
FUNCTIONS = {"kind": "python", "path": f"{LIB}/logging/*.py,{LIB}/email/*.py", "name": "functions"}
SMALL = {
  "model.embed_dim": 32, "model.num_layers": 1, "training.steps": 12, "training.batch_size": 8,
  "training.eval_every": 0, "training.eval_batches": 1, "optimizer.warmup_steps": 0, "optimizer.schedule": "constant",
  "logging.every": 1, "logging.tensorboard": False, "mesh.data": 1, "data.heldout_fraction": 0.2,
}  # fmt: skip
JOBS = {
  "bert_mlm_tiny": {"data.sources": TEXT, "data.tokenizer.vocab_size": 384, "training.seq_len": 64},
  "t5_span_tiny": {"data.sources": TEXT, "data.tokenizer.vocab_size": 384, "training.seq_len": 64},
  "seq2seq_tiny": {
    "data.sources": [FUNCTIONS | {"fields": ("docstring", "name")}], "data.tokenizer.vocab_size": 384,
    "training.seq_len": 64, "data.target_len": 16,
  },
  "classify_tiny": {
    "data.sources": [FUNCTIONS | {"fields": ("code", "package")}], "data.tokenizer.vocab_size": 384,
    "training.seq_len": 64,
  },
}  # fmt: skip


def flags(name, data):
  settings = SMALL | JOBS[name] | {"data.dir": str(data)}
  return [f"--config={CONFIGS / name}.py", *(f"--config.{key}={value}" for key, value in settings.items())]


def losses(run):
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  return {row["step"]: row["loss"] for row in rows if "loss" in row}, {k: v for row in rows for k, v in row.items()}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "t5_span_tiny" else ()) for n in JOBS])
def test_a_config_learns(door, tmp_path, name):
  job = flags(name, tmp_path / "data")
  code, _, err = door("prepare", *job)
  assert code == 0, err
  code, out, err = door("train", *job, f"--workdir={tmp_path / 'run'}")
  assert code == 0, err
  curve, last = losses(tmp_path / "run")
  assert len(curve) == 12
  assert sum(curve[s] for s in (10, 11, 12)) < sum(curve[s] for s in (1, 2, 3)) - 0.3
  assert 0 < last["eval/accuracy"] < 1 and last["eval/loss"] > 0
  assert "eval/bits_per_byte" not in last and ("eval/f1" in last) == (name == "classify_tiny")
  assert "eval: loss" in out and not list((tmp_path / "run").glob("samples/*"))
  if name == "bert_mlm_tiny":
    code, _, err = door("evaluate", f"--model={tmp_path / 'run'}")
    assert code == 2 and "'masked_lm'" in err and "next token" in err


def test_masked_training_resumes_exactly(door, tmp_path):
  """Six steps at once are bit for bit three and three: noise, order and weights."""
  job = flags("bert_mlm_tiny", tmp_path / "data")
  code, _, err = door("prepare", *job)
  assert code == 0, err
  for run, stops in (("whole", (6,)), ("parts", (3, 6))):
    for steps in stops:
      code, _, err = door("train", *job, f"--workdir={tmp_path / run}", f"--config.training.steps={steps}")
      assert code == 0, err
  whole, parts = losses(tmp_path / "whole")[0], losses(tmp_path / "parts")[0]
  assert list(parts) == [1, 2, 3, 4, 5, 6] and parts == whole


BAD = {
  ("bert_mlm_tiny", "objective.name=causal_lm"): ("model.architecture 'decoder'", "'encoder'"),
  ("bert_mlm_tiny", "data.task=text"): ("model.head 'lm' with data.task 'masking'",),
  ("bert_mlm_tiny", "data.corruption.mask_id=2112"): ("data.corruption.mask_id 2112", "model.vocab_size 2112"),
  ("bert_mlm_tiny", "data.corruption.rate=1.5"): ("data.corruption.rate",),
  ("t5_span_tiny", "data.packing=split"): ("data.packing 'split'", "best_fit"),
  ("seq2seq_tiny", "data.target_len=500"): ("data.target_len 500", "model.max_seq_len"),
  ("classify_tiny", "model.num_labels=3"): ("9 classes", "model.num_labels is 3"),
  ("classify_tiny", "data.task=token_classification"): ("'token_classification'",),
}


@pytest.mark.parametrize("name, flag", BAD, ids=[" ".join(case) for case in BAD])
def test_what_does_not_fit_is_one_line(door, tmp_path, name, flag):
  code, _, err = door("train", f"--config={CONFIGS / name}.py", f"--workdir={tmp_path}", f"--config.{flag}")
  errors = [line for line in err.splitlines() if line.startswith("error: ")]
  assert code == 2 and len(errors) == 1
  for word in BAD[name, flag]:
    assert word in errors[0]
