"""The digest of what a run begins with: of all that it stands on, and of nothing beside it."""

import json

import pytest

from jaxllm.interop.fingerprint import fingerprint


def written(file, text="{}"):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text)
  return file


@pytest.fixture
def base(tmp_path):
  written(tmp_path / "base" / "config.json")
  written(tmp_path / "base" / "model.safetensors", "weights")
  return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
  settings = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
  written(tmp_path / "adapter" / "adapter_config.json", json.dumps(settings))
  return tmp_path / "adapter"


def run_over(base, directory, **record):
  written(directory / "checkpoints" / "3" / "manifest.json")
  record = {"path": str(base), "step": None, "adapter": None} | record
  written(directory / "start.json", json.dumps(record))
  return directory


def test_an_adapter_stands_on_its_base(base, adapter):
  whole, alone = fingerprint(adapter), fingerprint(adapter, alone=True)
  written(base / "model.safetensors", "others")
  assert fingerprint(adapter) != whole and fingerprint(adapter, alone=True) == alone


def test_a_run_stands_on_what_it_began_with(base, adapter, tmp_path):
  run = run_over(base, tmp_path / "run", adapter=str(adapter))
  before = fingerprint(run, 3)
  written(base / "model.safetensors", "others")
  changed = fingerprint(run, 3)
  written(adapter / "adapter_model.safetensors", "factors")
  assert len({before, changed, fingerprint(run, 3)}) == 3
  fresh = run_over("start", tmp_path / "fresh")
  written(fresh / "start" / "0" / "manifest.json", "1")
  before = fingerprint(fresh, 3)
  written(fresh / "start" / "0" / "manifest.json", "2")
  assert fingerprint(fresh, 3) != before


def test_what_lies_in_a_model_s_directory_is_no_part_of_it(base):
  before = fingerprint(base)
  run_over(base, base / "runs" / "mine")
  written(base / ".cache" / "huggingface" / "download.json")
  assert fingerprint(base) == before
  written(base / "params" / "a.safetensors", "those of a model directory")
  assert fingerprint(base) != before
