"""No door makes a folder "gs:" of a URL."""

import re

import pytest

from jaxllm import convert, evaluate, generate, prepare, train
from jaxllm.cli import run_door

URL = "gs://bucket/thing"


@pytest.mark.parametrize(
  "door, arguments",
  [
    (train, ["--workdir=" + URL]),
    (train, ["--config.data.dir=" + URL]),
    (prepare, ["--config.data.dir=" + URL]),
    (generate, ["--model=" + URL, "--prompt=a"]),
    (evaluate, ["--model=" + URL]),
    (evaluate, ["--model=m", "--data=" + URL]),
    (convert, ["--from=" + URL, "--to=m", "--format=hf"]),
    (convert, ["--from=m", "--to=" + URL, "--format=hf"]),
    (convert, ["--from=m", "--to=" + URL, "--format=jaxllm"]),
    (convert, ["--from=m", "--to=" + URL, "--format=gguf"]),
  ],
)
def test_a_url_is_refused_in_one_line(job, tmp_path, monkeypatch, capsys, door, arguments):
  monkeypatch.chdir(tmp_path)
  if door in (train, prepare):
    arguments = [f"--config={job}", *arguments]
  assert run_door(door.main, arguments) == 2
  error = capsys.readouterr().err
  assert re.match(rf"error: (argument --\S+: )?{URL} is a URL, and object stores", error) and error.count("\n") == 1
  assert not (tmp_path / "gs:").exists()
