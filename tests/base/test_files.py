"""Paths that are no files of this machine."""

from pathlib import Path

import pytest

from jaxllm.base.errors import ConfigError
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
