"""The cache of compiled kernels: what is loaded is what was built, and by this user. (A stand-in compiles.)"""

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxllm.kernels import cpu_library
from jaxllm.kernels.cpu_library import BuildError

needs_gcc = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A cache of the test's own, and one small source."""
  sources = tmp_path / "sources"
  sources.mkdir()
  (sources / "a.cc").write_text('extern "C" int answer() { return 42; }')
  monkeypatch.setattr(cpu_library, "SOURCES", sources)
  monkeypatch.setenv("JAXLLM_CACHE_DIR", str(tmp_path / "cache"))
  cpu_library.cache_dir.cache_clear()
  yield tmp_path / "cache"
  cpu_library.cache_dir.cache_clear()


def compiler(tmp_path, monkeypatch, text):
  path = tmp_path / "compiler"
  path.write_text("#!/bin/sh\n" + text)
  path.chmod(0o755)
  monkeypatch.setenv("CXX", str(path))


@needs_gcc
def test_a_library_is_built_once_and_its_name_says_what_is_in_it(cache):
  library = cpu_library.build()
  assert cpu_library.build() == library and len(list((cache / "cpu_kernels").iterdir())) == 1
  assert ctypes.CDLL(str(library)).answer() == 42
  assert cpu_library._sha256(library) == library.stem.rpartition("-")[2]
  for path in (cache, cache / "cpu_kernels", library):
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@needs_gcc
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "writable", "link", "folder", "swapped", "folder mode"])
def test_what_may_have_been_changed_is_built_again(cache, caplog, damage):
  library = cpu_library.build()
  content = library.read_bytes()
  if damage == "flip":
    library.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  elif damage == "cut":
    library.write_bytes(content[: len(content) // 2])
  elif damage == "empty":
    library.write_bytes(b"")
  elif damage == "writable":
    library.chmod(0o777)
  elif damage == "folder":
    library.unlink()
    (library / "in it").mkdir(parents=True)
  elif damage == "swapped":  # another library that can be loaded
    (cache.parent / "b.cc").write_text('extern "C" int answer() { return 1; }')
    subprocess.run(["g++", "-shared", "-fPIC", cache.parent / "b.cc", "-o", library], check=True)
  elif damage == "link":
    library.rename(cache / "elsewhere.so")
    library.symlink_to(cache / "elsewhere.so")
  else:
    (cache / "cpu_kernels").chmod(0o777)
  again = cpu_library.build()
  assert ctypes.CDLL(str(again)).answer() == 42 and cpu_library.why_not_whole(again) is None
  assert stat.S_IMODE((cache / "cpu_kernels").stat().st_mode) & 0o022 == 0
  if damage != "folder mode":
    assert "it is built again" in caplog.text


@pytest.mark.parametrize(
  "text, message",
  [
    ("exit 1", r"fails \(exit code 1\): it says nothing"),
    ("kill -9 $$", r"fails \(signal 9\)"),
    ("echo 'x.cc:1: error: no such thing' >&2; echo more >&2; exit 2", "exit code 2.*: x.cc:1: error: no such thing$"),
    ("[ $1 = --version ] || exec sleep 60", "has not ended within 0.5 s"),
    ("exit 0", "cannot build the CPU kernels: .*out.so: there is no such file"),
  ],
)
def test_a_compiler_that_fails_is_one_line(cache, tmp_path, monkeypatch, text, message):
  compiler(tmp_path, monkeypatch, text)
  monkeypatch.setattr(cpu_library, "PATIENCE_S", 0.5)
  with pytest.raises(BuildError, match=message) as error:
    cpu_library.build()
  assert "\n" not in str(error.value)
  assert not list((cache / "cpu_kernels").iterdir()), "nothing is left"


@needs_gcc
def test_a_library_without_a_symbol(cache):
  assert cpu_library.load(("answer",)).answer() == 42
  with pytest.raises(BuildError, match="lacks question; delete it"):
    cpu_library.load(("answer", "question"))


def test_a_library_that_another_process_removes(cache, monkeypatch):
  assert cpu_library.why_not_whole(cache / "gone-0.so") == "it is gone"


def test_without_a_folder_of_temporary_files(cache, monkeypatch):
  """It is needed only where there is no other."""
  import tempfile

  def none():
    raise FileNotFoundError(2, "No usable temporary directory found")

  monkeypatch.setattr(tempfile, "gettempdir", none)
  assert cpu_library.cache_dir() == cache
  cpu_library.cache_dir.cache_clear()
  monkeypatch.setenv("JAXLLM_CACHE_DIR", "/dev/null/x")
  with pytest.raises(BuildError, match="cannot write /dev/null.*; no folder of temporary files can be written"):
    cpu_library.cache_dir()


@pytest.mark.parametrize("value", ['"', "nothing-of-that-name", "/nowhere/g++ -x"])
def test_no_compiler(monkeypatch, value):
  monkeypatch.setenv("CXX", value)
  assert cpu_library.compiler() == []


def test_a_compiler_with_arguments(monkeypatch):
  monkeypatch.setenv("CXX", "env -u NOTHING g++")
  assert cpu_library.compiler() == ["env", "-u", "NOTHING", "g++"]


@pytest.mark.parametrize("home", ["", "/", "relative/home"])
def test_without_a_home_it_is_a_folder_of_this_users(tmp_path, home):
  code = "from jaxllm.kernels import cpu_library; print(cpu_library.cache_dir())"
  env = {k: v for k, v in os.environ.items() if k != "JAXLLM_CACHE_DIR"} | {"HOME": home, "TMPDIR": str(tmp_path)}
  env["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
  place = Path(done.stdout.strip())
  assert place == tmp_path / f"jaxllm-{os.getuid()}" and stat.S_IMODE(place.stat().st_mode) == 0o700, done.stderr
  assert not Path("/.cache/jaxllm").exists() and "there is no home folder" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="gives files away")
def test_what_belongs_to_another_user_is_not_used(cache, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  cache.mkdir()
  os.chown(cache, 12345, 12345)
  assert cpu_library.cache_dir() == tmp_path / f"jaxllm-{os.getuid()}"
  assert f"{cache} belongs to another user" in caplog.text
  cpu_library.cache_dir.cache_clear()
  os.chown(tmp_path / f"jaxllm-{os.getuid()}", 12345, 12345)
  with pytest.raises(BuildError, match="belongs to another user; .* belongs to another user"):
    cpu_library.cache_dir()


def test_a_folder_of_many_people_stays_what_it_is(cache):
  """Of somebody's home or a shared disk only a folder of our own is closed to others, and nothing is removed."""
  for place in (cache, cache / "venv"):
    place.mkdir()
    place.chmod(0o1777)
    (place / "their.so").touch()
  own = cache / f"jaxllm-{os.getuid()}"
  assert cpu_library.cache_dir() == own and stat.S_IMODE(own.stat().st_mode) == 0o700
  assert stat.S_IMODE(cache.stat().st_mode) == 0o1777
  assert (cache / "their.so").exists() and (cache / "venv" / "their.so").exists()


def test_a_cache_that_is_no_path(cache, tmp_path, monkeypatch, caplog):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  monkeypatch.setenv("JAXLLM_CACHE_DIR", "~nobody-here/x")
  assert cpu_library.cache_dir() == tmp_path / f"jaxllm-{os.getuid()}"
  assert "JAXLLM_CACHE_DIR: ~nobody-here/x begins with the home of a user whom this machine" in caplog.text


def test_what_a_killed_build_left_goes(cache, tmp_path, monkeypatch):
  compiler(tmp_path, monkeypatch, "exit 0")
  cpu_library.make_private(cache)
  folder = cache / "cpu_kernels"
  old, young = folder / ".build-old", folder / ".build-young"
  for place in (old, young):
    place.mkdir(parents=True)
  folder.chmod(0o700)
  os.utime(old, (time.time() - 1e5,) * 2)
  with pytest.raises(BuildError):
    cpu_library.build()
  assert not old.exists() and young.exists()
