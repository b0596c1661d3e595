"""Paths that are no files of this machine."""

import errno
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from jaxllm.base import files
from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.base.files import local_path, new_directory


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://b", "https://host/model", "hdfs://n:80/a"])
def test_urls_are_refused_also_when_a_path_has_swallowed_a_slash(url):
  for form in (url, Path(url)):
    with pytest.raises(ConfigError, match="is a URL, and object stores cannot be read or written yet; mount it"):
      local_path(form)
  with pytest.raises(ConfigError, match="^gs://bucket/run is a URL"):
    local_path(Path("gs://bucket/run"))


def test_paths_stay_what_they_are(tmp_path):
  for path in ("runs/a", "/mnt/b:c/d", "step:3", "C:/runs", "a/b://c", str(tmp_path)):
    assert local_path(path) == Path(path)
  assert local_path("~/x") == Path.home() / "x"


def test_no_directory_is_made_for_a_url(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match="^gs://bucket/model is a URL"), new_directory(Path("gs://bucket/model")):
    pass
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["file:///tmp/x", Path("file:///tmp/x"), "file:x"])
def test_a_file_url_is_told_how_to_be_a_path(form):
  with pytest.raises(ConfigError, match="leave out the file:// before the path"):
    local_path(form)


@pytest.mark.parametrize("form", ["", " ", "\n", "a\0b"])
def test_nothing_is_no_path(form):
  with pytest.raises(ConfigError, match="is no path; name a file or folder"):
    local_path(form)


def test_names_that_are_not_in_utf8(tmp_path):
  """TensorStore, ArrayRecord and tokenizers cannot open them."""
  with pytest.raises(ConfigError, match=r"run-\\udcff is not in UTF-8"):
    local_path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff"))


def test_no_folder_of_temporary_files(monkeypatch):
  import tempfile

  def none():
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

  monkeypatch.setattr(tempfile, "gettempdir", none)
  said = "no folder of temporary files can be written; .* set TMPDIR"
  with pytest.raises(CheckpointError, match=said), files.scratch_directory():
    pass


def fill(path, text, may_replace=lambda _: True):
  with new_directory(path, may_replace) as new:
    (new / "file").write_text(text)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_directory_is_replaced_whole(tmp_path, monkeypatch, exchanges):
  if not exchanges:
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
  for text in ("one", "two"):
    fill(tmp_path / "model", text)
    assert (tmp_path / "model" / "file").read_text() == text and len(list(tmp_path.iterdir())) == 1


KILLED = """
  import os, signal, sys
  from pathlib import Path
  from jaxllm.base import files
  if sys.argv[2] == "False":
    files._exchange = lambda *_: False
  calls = [int(sys.argv[3])]
  def killing(act):
    def call(*arguments, **options):
      if calls[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
      calls[0] -= 1
      return act(*arguments, **options)
    return call
  for name in ("rename", "mkdir"):
    setattr(Path, name, killing(getattr(Path, name)))
  files._exchange, files.shutil.rmtree = killing(files._exchange), killing(files.shutil.rmtree)
  files._flush_tree, files._flush = killing(files._flush_tree), killing(files._flush)
  with files.new_directory(Path(sys.argv[1]), lambda _: True) as new:
    (new / "file").write_text("two")
"""


@pytest.mark.parametrize("exchanges", [True, False])
def test_killed_at_any_moment_one_of_the_two_is_there(tmp_path, exchanges):
  """Killed before each of the calls that change the disk, until one ends by itself."""
  path, ended, seen = tmp_path / "model", False, set()
  for calls in range(30):
    fill(path, "one")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), path, str(exchanges), str(calls)]
    ended = subprocess.run(command).returncode == 0
    if exchanges:
      assert path.is_dir(), "at no moment is there none"
    files.recover(path)
    seen.add((path / "file").read_text())
    fill(path, "three")
    assert [p.name for p in tmp_path.iterdir()] == ["model"], "the next one leaves nothing of it"
    if ended:
      break
  assert ended and calls > 5 and seen == {"one", "two"}


def test_scratch_directories_of_the_dead_go(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  code = f"import tempfile, os; tempfile.tempdir = {str(tmp_path)!r}; from jaxllm.base.files import scratch_directory\n"
  code += (
    "with scratch_directory() as place:\n  (place / 'x').touch()\n  print(place, flush=True)\n  os.kill(os.getpid(), 9)"
  )
  dead = Path(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout.strip())
  assert (dead / "x").exists()
  monkeypatch.setattr(files, "_YOUNG_S", -1.0)
  with files.scratch_directory() as mine, files.scratch_directory() as other:
    assert mine.is_dir() and other.is_dir() and not dead.exists(), "those in use stay"
  assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_leaves_nothing_and_the_old_one(tmp_path):
  fill(tmp_path / "model", "one")
  with (
    pytest.raises(CheckpointError, match=f"cannot write {tmp_path}/model.*: the disk is full; free some space"),
    new_directory(tmp_path / "model", lambda _: True) as new,
  ):
    (new / "file").write_text("half")
    raise OSError(errno.ENOSPC, "x")
  with (
    pytest.raises(CheckpointError, match="cannot write .*: the disk quota is used up"),
    files.new_file(tmp_path / "model" / "file"),
  ):
    raise OSError(errno.EDQUOT, "x")
  assert [p.name for p in tmp_path.rglob("*")] == ["model", "file"]
  assert (tmp_path / "model" / "file").read_text() == "one"
