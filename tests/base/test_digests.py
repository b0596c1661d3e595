"""Directories that are checked against their manifest."""

import os
import random
import shutil

import pytest

from jaxllm.base import digests
from jaxllm.base.errors import CheckpointError


@pytest.fixture
def sealed(tmp_path):
  place = tmp_path / "model"
  (place / "params").mkdir(parents=True)
  (place / "config.json").write_text('{"a": 1}')
  (place / "tokenizer.model").write_bytes(bytes(range(64)))
  (place / "params" / "model.safetensors").write_bytes(random.Random(0).randbytes(1000))
  digests.seal(place)
  return place


def test_no_bit_of_any_file_changes_unseen(sealed):
  assert digests.check(sealed)
  draw = random.Random(0)
  for path in sorted(p for p in sealed.rglob("*") if p.is_file()):
    content = path.read_bytes()
    for at in range(len(content)) if len(content) < 100 else draw.sample(range(len(content)), 100):
      path.write_bytes(content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :])
      with pytest.raises(CheckpointError, match=f"{path} has changed since it was written; put back .* delete "):
        digests.check(sealed)
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{path} has "):
      digests.check(sealed)
    path.write_bytes(content)
  assert digests.check(sealed)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "params/model.safetensors"])
def test_a_file_that_is_gone_is_missed(sealed, name):
  (sealed / name).unlink()
  with pytest.raises(CheckpointError, match=f"{sealed / name} is missing; put back what was there"):
    digests.check(sealed)


def test_a_file_that_has_come_is_refused_where_it_would_be_read(sealed):
  (sealed / "README.md").write_text("mine")
  (sealed / "chat_template.jinja").write_text("{{ 1 }}")
  assert digests.check(sealed)
  with pytest.raises(CheckpointError, match="chat_template.jinja was not there when .* was written"):
    digests.check(sealed, ["*.jinja"])


def test_no_manifest_is_said_once(sealed, caplog):
  (sealed / digests.NAME).unlink()
  with caplog.at_level("WARNING", "jaxllm"):
    assert not digests.check(sealed) and not digests.check(sealed)
  assert [r.getMessage() for r in caplog.records] == [
    f"{sealed} has no {digests.NAME}, so nobody knows whether its files are those that were written"
  ]
  (sealed / digests.NAME).symlink_to("nowhere")
  with pytest.raises(CheckpointError, match="jaxllm_manifest.json is missing"):
    digests.check(sealed)


def test_a_kill_while_files_are_replaced_leaves_a_good_directory(tmp_path, monkeypatch):
  """After each of the writes that `record` makes."""
  old = {"config.json": b"old", "start.json": b"one"}
  new = {"config.json": b"newer", "more.json": b"two"}
  write = digests.write_atomically
  for last in range(5):
    place = tmp_path / str(last)
    place.mkdir()
    monkeypatch.setattr(digests, "write_atomically", write)
    digests.record(place, old)
    left = [last]

    def killed(path, content, left=left):
      if left[0] == 0:
        raise KeyboardInterrupt
      left[0] -= 1
      write(path, content)

    monkeypatch.setattr(digests, "write_atomically", killed)
    if last < 4:
      with pytest.raises(KeyboardInterrupt):
        digests.record(place, new)
    else:
      digests.record(place, new)
    monkeypatch.setattr(digests, "write_atomically", write)
    assert digests.check(place)
    was = (place / "config.json").read_bytes()
    (place / "config.json").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="config.json has"):
      digests.check(place)
    (place / "config.json").write_bytes(was)
    digests.record(place, new)
    (place / "more.json").unlink()
    with pytest.raises(CheckpointError, match="more.json is missing"):
      digests.check(place)


def test_a_copied_directory_is_as_good(sealed, tmp_path):
  shutil.copytree(sealed, tmp_path / "copy")
  assert digests.check(tmp_path / "copy")


@pytest.mark.parametrize(
  "files", [None, [], {"a": 5}, *({name: digests.digest_of(b"")} for name in ("../a", "/a", "\0"))]
)
def test_a_manifest_that_a_stranger_has_signed_names_files_of_its_directory(tmp_path, files):
  """Whoever packs a directory can sign anything."""
  digests.write_signed(tmp_path / digests.NAME, {"files": files})
  with pytest.raises(CheckpointError, match="was not written by jaxllm"):
    digests.check(tmp_path)


def test_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / digests.NAME)
  with pytest.raises(CheckpointError, match="is a pipe, socket or device"):
    digests.check(tmp_path)
