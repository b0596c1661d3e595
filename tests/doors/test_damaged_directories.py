"""Models, runs and adapters of which a file has changed: never loaded in silence."""

import random
import shutil

import pytest

from jaxllm.base.digests import NAME
from jaxllm.base.errors import UserError
from jaxllm.cli import run_door
from jaxllm.interop.open import open_model


@pytest.fixture(scope="module")
def forms(job, tmp_path_factory):
  """A run that trains adapters of a model directory, which are in a directory of their own too."""
  from jaxllm import convert, train

  folder = tmp_path_factory.mktemp("forms")
  flags = [f"--config={job}", "--config.training.steps=1", "--config.training.sample_every=0"]
  assert run_door(train.main, [*flags, f"--workdir={folder / 'whole'}"]) == 0
  assert run_door(convert.main, [f"--from={folder / 'whole'}", f"--to={folder / 'model'}", "--format=jaxllm"]) == 0
  flags += [f"--config.model_init.path={folder / 'model'}", "--config.peft.kind=lora"]
  assert run_door(train.main, [*flags, f"--workdir={folder / 'run'}"]) == 0
  return folder


FILES = {
  "model": ["config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"],
  "run": ["config.json", "start.json", "tokenizer/tokenizer.model", "tokenizer/tokenizer_config.json"],
  "run/adapter": ["adapter_config.json", "adapter_model.safetensors", "tokenizer.model"],
}


@pytest.mark.parametrize("form", FILES)
def test_bits_and_files(forms, tmp_path, form, caplog):
  copy = shutil.copytree(forms / form, tmp_path / "copy")
  open_model(copy)
  assert NAME not in caplog.text
  draw = random.Random(0)
  for name in (*FILES[form], NAME):
    content = (copy / name).read_bytes()
    for at in [0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(6))]:
      (copy / name).write_bytes(content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :])
      with pytest.raises(UserError) as error:
        open_model(copy)
      assert str(copy) in str(error.value) and "\n" not in str(error.value)
    if name != NAME:
      (copy / name).unlink()
      with pytest.raises(UserError):
        open_model(copy)
    (copy / name).write_bytes(content)
  open_model(copy)


def test_a_run_that_resumes_looks_too(forms, job, tmp_path, door):
  run = shutil.copytree(forms / "whole", tmp_path / "run")
  flags = [f"--config={job}", f"--workdir={run}", "--config.training.sample_every=0", "--config.training.steps=2"]
  for name in ("config.json", "tokenizer/tokenizer.model"):
    content = (run / name).read_bytes()
    (run / name).write_bytes(content.replace(b"e", b"f", 1))
    code, _, err = door("train", *flags)
    assert code == 2 and f"{run / name} has changed since it was written; put back" in err
    (run / name).write_bytes(content)
  (run / NAME).unlink()
  code, _, err = door("train", *flags)
  assert code == 0 and (run / NAME).exists(), "a run of before goes on, and has one from then on"


def test_a_manifest_that_is_gone_is_said_and_a_tokenizer_that_is_gone_refused(forms, tmp_path, caplog):
  copy = shutil.copytree(forms / "whole", tmp_path / "copy")
  (copy / NAME).unlink()
  assert open_model(copy).tokenizer is not None and f"{copy} has no {NAME}" in caplog.text
  shutil.rmtree(copy / "tokenizer")
  with pytest.raises(UserError, match="has no tokenizer/, which every run has"):
    open_model(copy)


@pytest.mark.parametrize("form", ["run/adapter", "gguf", "hf", "model", "whole", "run"])
def test_every_form_is_evaluated(forms, job, tmp_path, door, form):
  path = forms / form
  if form in ("gguf", "hf"):
    path = tmp_path / ("x.gguf" if form == "gguf" else "x")
    assert door("convert", f"--from={forms / 'whole'}", f"--to={path}", f"--format={form}")[0] == 0
  code, out, err = door("evaluate", f"--model={path}", f"--data={job.parent / 'data'}", "--seq-len=32")
  assert code == 0 and "this model" in out, err
  if form not in ("whole", "run"):
    code, _, err = door("evaluate", f"--model={path}")
    assert code == 2 and err.splitlines()[-1].endswith("name prepared data with --data=DIR")
