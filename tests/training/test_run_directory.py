"""The run directory: the rule for what a resumed run may change, one trainer, one folder for all hosts."""

import json
import socket
from pathlib import Path

import pytest

from jaxllm.base.errors import CheckpointError, ConfigError, UserError
from jaxllm.training.run_directory import check_same_run, hold_run_directory, open_run_directory

CONFIG = {
  "model": {"embed_dim": 64, "layer_pattern": ("local", "global"), "rope_scaling": None},
  "training": {"steps": 100, "batch_size": 8},
  "optimizer": {"rules": ({"pattern": ".*", "lr_scale": 1.0},)},
  "data": {"workers": 0, "prefetch": 16, "dir": "data/a"},
  "mesh": {"fsdp": 1},
  "logging": {"every": 10},
  "checkpoint": {"every": 10},
  "profile": {"steps": 0},
}


def changed(**changes):
  config = json.loads(json.dumps(CONFIG))
  for key, value in changes.items():
    group, name = key.split("__")
    config.setdefault(group, {})[name] = value
  return config


def test_config_json_says_whose_run_it_is(tmp_path):
  directory = open_run_directory(tmp_path / "a" / "run", CONFIG)
  saved = json.loads((directory / "config.json").read_text())
  environment = saved.pop("environment")
  assert saved == json.loads(json.dumps(CONFIG))
  import jax
  import optax

  assert environment["versions"]["jax"] == jax.__version__
  assert environment["versions"]["optax"] == optax.__version__
  assert environment["devices"] == f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  assert {"git_commit", "host", "command", "processes"} <= environment.keys()


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"training__steps": 101},
    {"logging__every": 1, "logging__new": True},
    {"checkpoint__every": 7},
    {"profile__steps": 3},
    {"mesh__fsdp": 8},
    {"data__workers": 4, "data__prefetch": 1},
  ],
)
def test_what_a_resumed_run_may_change(tmp_path, change):
  open_run_directory(tmp_path, CONFIG)
  open_run_directory(tmp_path, changed(**change))
  saved = json.loads((tmp_path / "config.json").read_text())
  del saved["environment"]
  assert saved == changed(**change), "config.json is that of the latest start"


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model__embed_dim": 128}, "model.embed_dim was 64 and is now 128"),
    (
      {"model__layer_pattern": ["local"]},
      r"model.layer_pattern was \['local', 'global'\] and is now \['local'\]",
    ),
    ({"training__steps": 99}, "training.steps was 100 and may only grow, not become 99"),
    ({"training__seed": 1}, "training.seed was 'unset' and is now 1"),
    ({"data__dir": "b"}, "data.dir was 'data/a' and is now 'b'"),
    (
      {"model__embed_dim": 1, "model__a": 1, "model__b": 1, "model__c": 1, "model__d": 1},
      "model.embed_dim was .*, model.a was .*, model.b was .* and 2 more$",
    ),
  ],
)
def test_another_config_is_refused_by_its_first_keys(tmp_path, change, message):
  with pytest.raises(ConfigError, match=message):
    check_same_run(CONFIG, changed(**change))
  open_run_directory(tmp_path, CONFIG)
  before = (tmp_path / "config.json").read_bytes()
  with pytest.raises(ConfigError, match=f"{tmp_path} holds another run: .*; choose another --workdir"):
    open_run_directory(tmp_path, changed(**change))
  assert (tmp_path / "config.json").read_bytes() == before


def test_a_directory_that_cannot_be_made_or_read_is_said_in_one_line(tmp_path):
  file = tmp_path / "file"
  file.touch()
  with (
    pytest.raises(ConfigError, match=f"cannot create the run directory {file}/run: "),
    hold_run_directory(file / "run"),
  ):
    pass
  with pytest.raises(CheckpointError, match=f"cannot read or write {file}/run.*: a part of the path is a file"):
    open_run_directory(file / "run", CONFIG)
  (tmp_path / "config.json").write_text("[1, 2")
  with pytest.raises(ConfigError, match=f"{tmp_path}/config.json is damaged; restore it, or choose another"):
    open_run_directory(tmp_path, CONFIG)


def test_the_run_directory_is_made_and_held(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with hold_run_directory("a/run") as directory:
    assert directory == Path("a/run") and [path.name for path in directory.iterdir()] == ["lock"]
    with pytest.raises(UserError, match="^a/run is in use by "), hold_run_directory("a/run"):
      pass
  with pytest.raises(ConfigError, match="^gs://b/run is a URL"), hold_run_directory("gs://b/run"):
    pass
  with pytest.raises(ConfigError, match="^gs://b/run is a URL"):
    open_run_directory(Path("gs://b/run"), CONFIG)
  assert [path.name for path in tmp_path.iterdir()] == ["a"]


RUN = """
  import sys, time
  from pathlib import Path
  from jaxllm.base.errors import CheckpointError, ConfigError, UserError
  import jaxllm.training.run_directory as run_directory
  from jaxllm.training.run_directory import hold_run_directory, open_run_directory
  run_directory.SHARING_PATIENCE_S = 0.5
"""


def test_hosts_that_do_not_share_the_run_directory_are_named(two_processes, tmp_path):
  code = """
  mine = Path(sys.argv[1]) / f"disk{index}" / "run"
  for path in (Path(sys.argv[1]) / "shared", mine):
    try:
      with hold_run_directory(path) as directory:
        print("entered", directory.name)
    except ConfigError as error:
      print("error:", error)
  """
  host = socket.gethostname()
  for output in two_processes(RUN + code, tmp_path):
    assert "entered shared\n" in output and "entered run" not in output
    assert (
      f"error: {tmp_path}/disk0/run is not one folder for all hosts: what process 0 on host {host} writes is not seen "
      f"by process 1 on host {host}; choose a --workdir on a file system that they share\n"
    ) in output
  assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["lock"]


def test_two_names_of_one_directory_are_refused(two_processes, tmp_path):
  code = """
  try:
    with hold_run_directory(Path(sys.argv[1]) / ("run", "link")[index]):
      pass
  except ConfigError as error:
    print("error:", error)
  """
  (tmp_path / "link").symlink_to(tmp_path / "run")
  for output in two_processes(RUN + code, tmp_path):
    assert f"error: the run directory is {tmp_path}/run for process 0 on host" in output
    assert f"and {tmp_path}/link for process 1" in output


def test_a_run_directory_in_use_or_of_another_run_is_refused_on_all_hosts(two_processes, tmp_path):
  code = """
  from jaxllm.base.locks import hold
  import subprocess
  path = Path(sys.argv[1])
  if index == 0:
    other = subprocess.Popen([sys.executable, "-c", "if True:\\n"
      "  import sys; from pathlib import Path; from jaxllm.base.locks import hold\\n"
      "  with hold(Path(sys.argv[1])): print(flush=True); sys.stdin.read()", path],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    print("other", other.pid)
  try:
    with hold_run_directory(path):
      print("entered")
  except UserError as error:
    print("error:", error)
  if index == 0:
    other.kill(), other.wait()
  with hold_run_directory(path) as directory:
    open_run_directory(directory, {"training": {"steps": 3}})
    for steps in (4, 2):
      try:
        open_run_directory(directory, {"training": {"steps": steps}})
        print("opened", steps)
      except UserError as error:
        print("error:", error)
  """
  outputs = two_processes(RUN + code, tmp_path)
  pid = outputs[0].split("other ")[1].split()[0]
  for output, start in zip(outputs, ("error: ", "error: process 0 failed: ")):
    assert "entered" not in output and "opened 4\n" in output and "opened 2" not in output
    assert f"{start}{tmp_path} is in use by pid {pid} on host " in output
    assert f"{start}{tmp_path} holds another run: training.steps was 4 and may only grow, not become 2; " in output


def test_what_is_of_no_run_is_not_replaced(tmp_path):
  """--workdir=. in somebody's project, say."""

  class Saved:
    fingerprint = "of the data"

    def save(self, place):
      (place / "tokenizer.model").write_bytes(b"")

  (tmp_path / "tokenizer").mkdir()
  (tmp_path / "tokenizer" / "mine.txt").write_text("mine")
  with pytest.raises(
    CheckpointError, match=f"^{tmp_path}/tokenizer has other things in it; choose an empty or new dir"
  ):
    open_run_directory(tmp_path, CONFIG, Saved())
  assert (tmp_path / "tokenizer" / "mine.txt").read_text() == "mine"
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
  with pytest.raises(
    ConfigError, match=f"^{tmp_path} has a metrics.jsonl and no config.json: choose another --workdir"
  ):
    open_run_directory(tmp_path, CONFIG)
  assert not (tmp_path / "config.json").exists() and (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_tokenizer_that_a_killed_start_has_left_is_written_again(tmp_path):
  from chat_tokenizer import chat_tokenizer

  tokenizer = chat_tokenizer()
  for _ in range(2):
    open_run_directory(tmp_path, CONFIG, tokenizer)
    (tmp_path / "config.json").unlink()
