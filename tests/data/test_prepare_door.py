"""The door's own arguments, and what it takes from a job's variables."""

import argparse
import dataclasses

import pytest

from jaxllm import prepare as door
from jaxllm.base.errors import ConfigError
from jaxllm.data.config import DataConfig, SourceConfig, TokenizerConfig


def test_hosts():
  assert door._host("0/4") == (0, 4) and door._host("3/4") == (3, 4)
  for text in ("4/4", "1", "-1/2", "a/b", "0/0", "1/2/3", ""):
    with pytest.raises(argparse.ArgumentTypeError):
      door._host(text)
  for text in ("0", "-1", "x", "1e3", "", "9" * 30):
    with pytest.raises(argparse.ArgumentTypeError):
      door._processes(text)


@pytest.mark.parametrize(
  "variables, found",
  [
    ({}, (0, 1)),
    ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8"}, (2, 8)),
    ({"SLURM_PROCID": "0"}, (0, 1)),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2)),
    ({"JOB_COMPLETION_INDEX": "4", "JOB_COMPLETIONS": "5"}, (4, 5)),
  ],
)
def test_variables_of_a_job(variables, found):
  assert door._host_of_job(variables) == found


def test_variables_that_say_nothing():
  with pytest.raises(ConfigError, match="SLURM_PROCID='x' and SLURM_STEP_NUM_TASKS='2' name no host") as caught:
    door._host_of_job({"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2"})
  assert "\n" not in str(caught.value)


def test_the_report_counts(tmp_path, byte_tokenizer, capsys):
  (tmp_path / "a.jsonl").write_text('{"text": "same"}\n' * 5 + '{"text": null}\n{"text": "other"}\n')
  source = SourceConfig(kind="jsonl", path=f"{tmp_path}/a.jsonl", on_null="skip")
  config = DataConfig(f"{tmp_path}/out", (source,), TokenizerConfig(str(byte_tokenizer)), heldout_fraction=0.2)
  assert door.prepare_and_report(config, processes=1) == 0
  said = capsys.readouterr().out
  assert "1 rows of a without the field left out" in said
  assert "4 documents repeat another word for word" in said
  assert door.prepare_and_report(dataclasses.replace(config, packing="none"), shared=True) == 0
  assert "already prepared" in capsys.readouterr().out
