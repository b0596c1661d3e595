"""`jaxllm.train` as its users meet it: what a run leaves behind, and every way it can refuse to start."""

import json
import shutil
import signal

import pytest


def read_metrics(run):
  return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(job, tmp_path_factory):
  from jaxllm.cli import run_door
  from jaxllm.train import main

  run = tmp_path_factory.mktemp("runs") / "tiny"
  assert run_door(main, [f"--config={job}", f"--workdir={run}"]) == 0
  return run


def test_a_run_leaves_its_config_curve_checkpoints_tokenizer_and_samples(trained):
  saved = json.loads((trained / "config.json").read_text())
  assert saved["model"]["embed_dim"] == 32 and saved["training"]["steps"] == 6
  rows = read_metrics(trained)
  losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
  assert list(losses) == [1, 2, 3, 4, 5, 6]
  assert losses[6] < losses[1]
  last = {key: value for row in rows for key, value in row.items()}
  for key in ("learning_rate", "grad_norm", "tokens", "tokens_per_second", "step_time_s", "memory_gib",
              "accuracy", "eval/loss", "eval/bits_per_byte"):  # fmt: skip
    assert isinstance(last[key], float | int), key
  assert "mfu" not in last, "nobody knows the peak of a CPU"
  assert last["tokens"] == 6 * 4 * 32
  assert [path.read_text().strip() for path in (trained / "samples").glob("*6*.txt")] != [""]
  assert (trained / "checkpoints" / "6" / "manifest.json").exists()
  assert any((trained / "tokenizer").iterdir())


def test_a_finished_run_starts_again_for_more_steps_only(door, job, trained, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(trained, run)
  code, out, err = door("train", f"--config={job}", f"--workdir={run}", "--config.training.steps=8")
  assert code == 0, err
  assert [row["step"] for row in read_metrics(run) if "loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_finished_run_started_again_adds_nothing(door, job, trained, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(trained, run)
  before = read_metrics(run)
  for _ in range(2):
    code, out, err = door("train", f"--config={job}", f"--workdir={run}")
    assert code == 0, err
    assert read_metrics(run) == before
    assert f"bits per byte {before[-1]['eval/bits_per_byte']:.4f}" in out.splitlines()[-1]


def test_the_last_step_of_a_stopped_run_is_logged(door, job, tmp_path, monkeypatch):
  """Though it is no multiple of logging.every; and what was due at that step is made up for."""
  from jaxllm.data.pipeline import TrainBatches

  real, run, read = TrainBatches.__next__, tmp_path / "run", []

  def and_signal(self):
    read.append(None)
    if len(read) == 3:
      signal.raise_signal(signal.SIGTERM)
    return real(self)

  monkeypatch.setattr(TrainBatches, "__next__", and_signal)
  flags = [f"--config={job}", f"--workdir={run}", "--config.logging.every=100", "--config.training.eval_every=3"]
  code, out, err = door("train", *flags)
  assert code == 0 and "stopped at step 3" in out, err
  assert [row["step"] for row in read_metrics(run) if "loss" in row] == [1, 3]
  assert not [row for row in read_metrics(run) if "eval/loss" in row]
  code, _, err = door("train", *flags)
  assert code == 0, err
  assert [row["step"] for row in read_metrics(run) if "eval/loss" in row] == [3, 6]


def test_a_run_of_an_earlier_version_goes_on(door, job, trained, tmp_path):
  """Whose config.json has keys at other places, and lacks some of today's."""
  run = tmp_path / "run"
  shutil.copytree(trained, run)
  saved = json.loads((run / "config.json").read_text())
  saved["training"] |= {key: saved["compute"][key] for key in ("dtype", "remat", "target")}
  saved["training"]["z_loss"] = saved["objective"].pop("z_loss")
  del saved["compute"], saved["training"]["sample_tokens"]
  (run / "config.json").write_text(json.dumps(saved))
  (run / "jaxllm_manifest.json").unlink()
  texts = [door("generate", f"--model={d}", "--prompt=a", "--seed=1", "--max-tokens=4")[:2] for d in (run, trained)]
  assert texts[0] == texts[1] and texts[0][0] == 0
  flags = [f"--config={job}", f"--workdir={run}", "--config.training.sample_tokens=8"]
  code, _, err = door("train", *flags, "--config.training.steps=7")
  assert code == 0, err
  code, _, err = door("train", *flags, "--config.training.steps=8", "--config.compute.dtype=bfloat16")
  assert code == 2 and "compute.dtype was 'float32' and is now 'bfloat16'" in err


def test_an_old_name_is_one_line_and_nothing_is_trained(door, job, tmp_path):
  line = "error: config key training.dtype is called compute.dtype now\n"
  flags = [f"--config={job}", f"--workdir={tmp_path / 'run'}"]
  assert door("train", *flags, "--config.training.dtype=bfloat16") == (2, "", line)
  text = job.read_text().replace('{"optimizer.learning_rate": ', '{"training.dtype": "bfloat16", "optimizer.b1": ')
  (tmp_path / "swept.py").write_text(text)
  assert door("train", f"--config={tmp_path / 'swept.py'}", flags[1], "--sweep") == (2, "", line)
  assert not (tmp_path / "run").exists()


def test_what_auto_came_to_is_kept(door, job, tmp_path, monkeypatch):
  from jaxllm.kernels import backends

  monkeypatch.setattr(backends, "has_bfloat16", lambda target: True)
  flags = [f"--config={job}", f"--workdir={tmp_path}", "--config.compute.dtype=auto", "--config.training.steps=2"]
  assert door("train", *flags)[0] == 0
  monkeypatch.setattr(backends, "has_bfloat16", lambda target: False)
  code, _, err = door("train", *flags)
  assert code == 2 and "compute.dtype was 'bfloat16' and is now 'float32'" in err


def test_a_signal_while_it_evaluates_stops_it(door, job, tmp_path, monkeypatch):
  from jaxllm.data.heldout import HeldoutBatches

  real, begun = HeldoutBatches.__iter__, []

  def and_signal(self):
    for number, batch in enumerate(real(self)):
      begun.append(number)
      if len(begun) == 2:
        signal.raise_signal(signal.SIGTERM)
      yield batch

  monkeypatch.setattr(HeldoutBatches, "__iter__", and_signal)
  flags = [f"--config={job}", f"--workdir={tmp_path}", "--config.training.eval_batches=0"]
  code, out, err = door("train", *flags, "--config.training.batch_size=1")
  assert code == 0 and "stopped at step 6" in out, err
  assert begun == [0, 1]
  assert not [row for row in read_metrics(tmp_path) if "eval/loss" in row]
  code, _, err = door("train", *flags, "--config.training.batch_size=1")
  assert code == 0, err
  assert [row["step"] for row in read_metrics(tmp_path) if "eval/loss" in row] == [6]


def test_the_last_step_is_logged_where_the_data_ends(door, job, tmp_path):
  flags = ["--config.data.epochs=0.05", "--config.logging.every=100", "--config.checkpoint.every=1"]
  code, _, err = door("train", f"--config={job}", f"--workdir={tmp_path}", "--config.training.steps=99", *flags)
  assert code == 0, err
  rows = read_metrics(tmp_path)
  assert [row["step"] for row in rows if "loss" in row] == [1, rows[-1]["step"]] and rows[-1]["step"] < 99


def test_sweep_makes_a_run_directory_per_point_and_a_table(door, job, tmp_path):
  code, out, err = door("train", f"--config={job}", f"--workdir={tmp_path}", "--sweep")
  assert code == 0, err
  runs = sorted(path.name for path in tmp_path.iterdir())
  assert runs == ["00-learning_rate=0.001,steps=2", "01-learning_rate=0.01,steps=2"]
  for run in runs:
    assert read_metrics(tmp_path / run)[-1]["step"] == 2
  table = out.splitlines()[-3:]
  assert table[0].split()[:2] == ["point", "loss"]
  assert all(run in line for run, line in zip(runs, table[1:]))


@pytest.mark.parametrize(
  "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")]
)
def test_a_point_without_memory_is_a_row_and_the_others_follow(door, job, tmp_path, monkeypatch, error):
  from jaxllm.training import loop

  train, calls = loop.train, []

  def first_fails(run, directory):
    calls.append(directory)
    if len(calls) == 1:
      raise error
    return train(run, directory)

  monkeypatch.setattr(loop, "train", first_fails)
  code, out, err = door("train", f"--config={job}", f"--workdir={tmp_path}", "--sweep")
  assert code == 2 and len(calls) == 2
  failed, whole = out.splitlines()[-2:]
  assert failed.startswith("learning_rate=0.001,steps=2  failed: out of memory") and "failed" not in whole
  assert err.splitlines()[-1] == "error: 1 of 2 points failed: learning_rate=0.001,steps=2"
  assert read_metrics(calls[1])[-1]["step"] == 2


def test_a_bug_of_ours_ends_a_sweep(door, job, tmp_path, monkeypatch):
  from jaxllm.training import loop

  monkeypatch.setattr(loop, "train", lambda *_: {}["a"])
  with pytest.raises(KeyError):
    door("train", f"--config={job}", f"--workdir={tmp_path}", "--sweep")


BAD = [
  (["--config.training.stepz=3"], ["unknown config key training.stepz", "training.steps"]),
  (["--config.training.steps=soon"], ["training.steps", "whole number"]),
  (["--config.training.seq_len=65"], ["training.seq_len 65", "model.max_seq_len 64"]),
  (["--config.mesh.data=16"], ["needs 16 devices", "there are 8"]),
  (["--config.mesh.data=-1", "--config.mesh.fsdp=3"], ["3 devices", "8"]),
  (["--config.mesh.tensor=4"], ["model.num_kv_heads 2", "mesh.tensor"]),
  (["--config.mesh.data=8"], ["training.batch_size 4", "8"]),
  (["--config.mesh.stage=2"], ["mesh.stage"]),
  (["--config.data.dir=nowhere"], ["nowhere", "jaxllm.prepare"]),
  (["--config.compute.attention=cudnn"], ["cudnn", "cpu"]),
  (["--config.compute.kernels=pallas"], ["kernels", "'pallas'", "h100", "not for cpu"]),
  (["--config.compute.kernels=cudnn"], ["compute.kernels", "'cudnn'", "'pallas'"]),
  (["--config.compute.target=h1000"], ["h1000", "h100"]),
  (["--config.optimizer.rules=[{'pattern':'nothing'}]"], ["nothing", "no parameter"]),
]


@pytest.mark.parametrize("flags, words", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(door, job, tmp_path, flags, words):
  code, out, err = door("train", f"--config={job}", f"--workdir={tmp_path / 'run'}", *flags)
  errors = [line for line in err.splitlines() if line.startswith("error: ")]
  assert code == 2 and len(errors) == 1, err
  assert "Traceback" not in err
  for word in words:
    assert word in errors[0]
  assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(door, job, tmp_path):
  code, _, err = door(
    "train", f"--config={job}", f"--workdir={tmp_path}", "--config.model.vocab_size=200",
    "--config.data.tokenizer.vocab_size=200",
  )  # fmt: skip
  assert code == 2
  assert "jaxllm.prepare" in err or "model.vocab_size" in err


def test_a_run_directory_of_another_config_is_refused_and_kept(door, job, trained, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(trained, run)
  before = (run / "config.json").read_text()
  code, _, err = door("train", f"--config={job}", f"--workdir={run}", "--config.model.num_layers=1")
  assert code == 2
  assert "model.num_layers" in err and str(run) in err
  assert (run / "config.json").read_text() == before


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(door, job, trained, tmp_path, caplog):
  run = tmp_path / "run"
  shutil.copytree(trained, run)
  files = [path for path in (run / "checkpoints" / "6").rglob("*") if path.is_file() and path.stat().st_size > 4000]
  victim = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(victim.read_bytes())
  content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
  victim.write_bytes(bytes(content))
  code, out, err = door("train", f"--config={job}", f"--workdir={run}", "--config.training.steps=7")
  assert code == 0, err
  said = err + caplog.text
  assert "checkpoint step 6 is damaged" in said and "step 4 instead" in said
  assert [row["step"] for row in read_metrics(run) if "loss" in row] == [1, 2, 3, 4, 5, 6, 7]


def test_with_no_good_checkpoint_left_it_says_so(door, job, trained, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(trained, run)
  for manifest in (run / "checkpoints").glob("*/manifest.json"):
    manifest.write_text(manifest.read_text()[:100])
  code, _, err = door("train", f"--config={job}", f"--workdir={run}", "--config.training.steps=7")
  assert code == 2
  assert "no good checkpoint" in err


def test_a_divergence_stops_with_the_last_good_state_saved(door, job, tmp_path):
  run = tmp_path / "run"
  flags = [
    "--config.optimizer.learning_rate=1e30",
    "--config.optimizer.clip_norm=None",
    "--config.optimizer.name=sgd",
  ]
  code, _, err = door("train", f"--config={job}", f"--workdir={run}", "--config.training.steps=20", *flags)
  assert code == 2
  assert "is bad" in err and "saved as step" in err
  bad = int(err.split("error: step ")[1].split()[0])
  assert (run / "checkpoints" / str(bad - 1) / "manifest.json").exists()


def test_skipped_steps_are_counted_and_the_run_goes_on(door, job, tmp_path):
  run = tmp_path / "run"
  flags = [
    "--config.optimizer.learning_rate=1e30",
    "--config.optimizer.clip_norm=None",
    "--config.optimizer.name=sgd",
  ]
  code, _, err = door("train", f"--config={job}", f"--workdir={run}", "--config.training.on_bad_step=skip", *flags)
  rows = [row for row in read_metrics(run) if "loss" in row]
  assert rows[-1]["step"] == 6 and rows[-1]["skipped"] >= 1, err


def test_print_config_lists_every_key(door, job):
  code, out, _ = door("train", f"--config={job}", "--print-config", "--config.training.steps=9")
  assert code == 0
  lines = out.splitlines()
  assert "config.training.steps=9" in lines and "config.model.embed_dim=32" in lines
