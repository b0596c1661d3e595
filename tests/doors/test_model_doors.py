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


def test_evaluate_takes_every_form_and_says_the_same(door, run, job, tmp_path):
  want = json.loads(door("evaluate", f"--model={run}", "--seq-len=32", "--json")[1])
  for format, name in (("jaxllm", "ours"), ("hf", "hf"), ("gguf", "file.gguf")):
    path = tmp_path / name
    assert door("convert", f"--from={run}", f"--to={path}", f"--format={format}")[0] == 0
    code, out, err = door("evaluate", f"--model={path}", f"--data={job.parent / 'data'}", "--seq-len=32", "--json")
    assert code == 0, err
    assert json.loads(out) == pytest.approx(want, rel=1e-6)
    code, _, err = door("evaluate", f"--model={path}")
    assert code == 2 and err.count("\n") == 1 and "name prepared data with --data=DIR" in err


def test_evaluate_takes_an_adapter(door, run, job, tmp_path):
  """One that takes everything out of the layers leaves what the embedding alone predicts."""
  from jaxllm import load_model
  from jaxllm.interop.safetensors import write_safetensors
  from jaxllm.interop.tensors import in_memory

  model = load_model(run)
  settings = {"peft_type": "LORA", "r": 32, "lora_alpha": 32, "base_model_name_or_path": str(run)}
  (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
  pairs = {}
  for layer in range(2):
    for ours, theirs in (("attention/output", "self_attn.o_proj"), ("mlp/down", "mlp.down_proj")):
      part, name = ours.split("/")
      weight = np.asarray(model._weights["blocks"][part][name]["weight"][layer]).reshape(-1, 32).T
      stem = f"base_model.model.model.layers.{layer}.{theirs}"
      pairs |= {f"{stem}.lora_A.weight": weight, f"{stem}.lora_B.weight": -np.eye(32, dtype=np.float32)}
  write_safetensors(tmp_path / "adapter_model.safetensors", in_memory(pairs))
  data = f"--data={job.parent / 'data'}"
  code, out, err = door("evaluate", f"--model={tmp_path}", data, "--json")
  assert code == 0, err
  assert json.loads(door("evaluate", f"--model={run}", f"--adapter={tmp_path}", data, "--json")[1]) == json.loads(out)
  merged = tmp_path / "merged"
  assert door("convert", f"--from={run}", f"--adapter={tmp_path}", f"--to={merged}", "--format=hf")[0] == 0
  again = json.loads(door("evaluate", f"--model={merged}", data, "--json")[1])
  assert again == pytest.approx(json.loads(out), rel=1e-6)
  embedding = model._weights["embedding"]["tokens"]
  ids = np.asarray(model.tokenizer.encode("abc def " * 3))
  x = np.asarray(embedding)[ids[:-1]].astype(np.float64)
  stored = load_model(tmp_path)
  x = (
    x
    / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.norm_eps)
    * np.asarray(model._weights["final_norm"]["scale"])
  )
  head = np.asarray(embedding if model.config.tie_embeddings else model._weights["head"]["weight"].T, np.float64)
  np.testing.assert_allclose(stored(ids[None, :-1])[0], x @ head.T, atol=1e-4)


def test_evaluate_refuses_what_does_not_predict_the_next_token(door, tmp_path):
  import jax

  from jaxllm.inference.model import Model
  from jaxllm.models.build import init_params
  from jaxllm.models.config import ModelConfig

  config = ModelConfig(
    vocab_size=32, embed_dim=8, num_layers=1, num_heads=1, max_seq_len=8, head="sequence", num_labels=2
  )
  Model(config, init_params(config, jax.random.key(0))).save(tmp_path / "classifier")
  code, _, err = door("evaluate", f"--model={tmp_path / 'classifier'}", "--data=nowhere")
  assert code == 2 and err.count("\n") == 1 and "model.head 'sequence'" in err


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
