"""`python -m jaxllm.bench generate`."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.bench import main
from jaxllm.cli import run_door
from jaxllm.inference.model import Model

sys.path.append(str(Path(__file__).parent / "inference"))
import tiny_models as tiny


def test_figures_of_every_batch_and_precision(tmp_path, capsys):
  tiny.save(tmp_path / "model")
  argv = ["generate", f"--model={tmp_path / 'model'}", "--batch=2,1", "--prompt-tokens=8", "--max-tokens=4"]
  assert run_door(main, [*argv, "--repeats=1", "--dtype=float32", f"--json={tmp_path / 'speed.json'}"]) == 0
  found = json.loads((tmp_path / "speed.json").read_text())
  assert [(one["batch"], one["dtype"], one["quantization"]) for one in found["speeds"]] == [
    (1, "float32", None),
    (2, "float32", None),
  ]
  for one in found["speeds"]:
    assert one["decode_tokens_per_second"] * one["token_seconds"] == pytest.approx(one["batch"])
    assert one["prefill_tokens_per_second"] * one["first_token_seconds"] == pytest.approx(8 * one["batch"])
  assert capsys.readouterr().out.count("tok/s written") == 2


@pytest.mark.parametrize("argument", ["--batch=0", "--batch=x", "--max-tokens=0"])
def test_impossible_settings(argument, capsys):
  assert run_door(main, ["generate", "--model=nowhere", argument]) == 2
  assert "must be" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, capsys):
  assert run_door(main, ["generate", "--model=nowhere", f"--json={tmp_path / 'none' / 'speed.json'}"]) == 2
  assert "there is no folder" in capsys.readouterr().err


def test_a_model_that_cannot_write(tmp_path, capsys):
  model = tiny.loose_model()
  Model(model.config, jax.tree.map(lambda w: w * np.nan, model.params), model.tokenizer).save(tmp_path / "model")
  argv = ["generate", f"--model={tmp_path / 'model'}", "--batch=1", "--prompt-tokens=8", "--max-tokens=4"]
  assert run_door(main, [*argv, "--repeats=1"]) == 2
  assert "not finite" in capsys.readouterr().err
