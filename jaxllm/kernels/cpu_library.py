"""Compiles the C++ kernels of `kernels/cpu/`, and keeps the library where nobody else can change it.

A library is code that this process will run, so it is loaded only from a folder and a file that belong to this user or
root and that no one else can write, and only if its content has the SHA-256 that stands in its name. One that is
damaged, or cut short (which would end the process with SIGBUS), is removed and built again.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jaxlib

from jaxllm.base import environment
from jaxllm.base.errors import CheckpointError, ConfigError, one_line
from jaxllm.base.files import local_path, temporary_folder
from jaxllm.base.os_errors import explain

log = logging.getLogger("jaxllm")
SOURCES = Path(__file__).with_name("cpu")
NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")
PATIENCE_S = 600.0  # for the compiler, which takes about a minute of one core
_STALE_S = 2 * PATIENCE_S  # a build of that age was killed
_BUILD = ".build-"


class BuildError(RuntimeError):
  """There is no library; the message says in one line why."""


@functools.cache
def cpu_flags() -> frozenset[str]:
  """Feature flags of this CPU as Linux names them; empty where that is unknown."""
  with contextlib.suppress(OSError):
    for line in Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("flags"):
        return frozenset(line.split(":", 1)[1].split())
  return frozenset()


def why_unavailable() -> str | None:
  """One line that says why the C++ kernels cannot run here, or None if they can (as far as is known unbuilt)."""
  if platform.system() != "Linux" or platform.machine() != "x86_64":
    return f"the C++ kernels are for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
  if missing := NEEDED - cpu_flags():
    return f"this CPU lacks {', '.join(sorted(missing))}"
  if not compiler():
    return "no C++ compiler (g++) was found; set CXX or install one"
  return None


def compiler() -> list[str]:
  """The command of the C++ compiler: $CXX (which may be "ccache g++"), else g++; [] if there is none."""
  try:
    words = shlex.split(environment.text("CXX") or "g++")
  except ValueError:  # a quotation mark without its other
    return []
  return words if words and shutil.which(words[0]) else []


@functools.cache
def cache_dir() -> Path:
  """Where what is compiled is kept, a folder of this user's alone: $JAXLLM_CACHE_DIR, else ~/.cache/jaxllm.

  A folder that $JAXLLM_CACHE_DIR names and that others may write is left as it is: jaxllm-<user> in it. Where there is
  no home (HOME is empty or /), or the folder cannot be written or is others' to change, it is jaxllm-<user> in the
  system's folder of temporary files, which a warning says.

  Raises:
    BuildError: nor is that one this user's alone.
  """
  asked, home, own = environment.text("JAXLLM_CACHE_DIR"), os.path.expanduser("~"), f"jaxllm-{os.getuid()}"
  why = "there is no home folder"
  try:
    place = None
    if asked:
      place = local_path(asked)
      place = place / own if _is_open(place) else place
    elif os.path.isabs(home) and home != "/":
      place = Path(home) / ".cache" / "jaxllm"
    if place is not None:
      reason = make_private(place)
      if reason is None:
        return place
      why = reason
  except ConfigError as error:
    why = f"JAXLLM_CACHE_DIR: {error}"
  try:
    temporary = temporary_folder() / own
    reason = make_private(temporary)
  except CheckpointError as error:
    reason = str(error)
  if reason is not None:
    raise BuildError(f"{why}; {reason}")
  log.warning("compiled kernels are kept in %s: %s", temporary, why)
  return temporary


def _is_open(folder: Path) -> bool:
  """Whether it is a folder that others may write."""
  try:
    return folder.is_dir() and bool(folder.stat().st_mode & 0o022)
  except OSError:
    return False


def make_private(folder: Path) -> str | None:
  """Makes a folder of this package that no other user can change, and says in one line why it is none; None: it is.

  One of this user's that others could write so far is closed to them, and what libraries lie in it go.
  """
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
      folder.mkdir(mode=0o700)
    facts = folder.stat() if folder.is_symlink() and folder.lstat().st_uid == os.getuid() else folder.lstat()
    if not stat.S_ISDIR(facts.st_mode):
      return f"{folder} is no folder"
    if facts.st_uid not in (os.getuid(), 0):
      return f"{folder} belongs to another user"
    if facts.st_mode & 0o022:
      if facts.st_uid != os.getuid():
        return f"{folder} can be changed by others"
      folder.chmod(facts.st_mode & 0o755)
      for library in folder.glob("*.so"):
        library.unlink()
    if not os.access(folder, os.W_OK | os.X_OK):
      return f"{folder} cannot be written"
  except OSError as error:
    return explain(error, "cannot write", folder) or str(error)
  return None


def build() -> Path:
  """The library: that of this CPU in the cache if it is whole, else compiled now. Raises BuildError."""
  folder = cache_dir() / "cpu_kernels"
  if reason := make_private(folder):
    raise BuildError(reason)
  try:
    key = _key()
    for library in sorted(folder.glob(f"{key}-*.so")):
      if reason := why_not_whole(library):
        log.warning("%s: %s; it is built again", library, reason)
        _remove(library)
      else:
        return library
    _remove_stale(folder)
    log.info("compiling the CPU kernels, once for this machine")
    with tempfile.TemporaryDirectory(dir=folder, prefix=_BUILD) as scratch:
      built = _compile(Path(scratch))
      library = folder / f"{key}-{_sha256(built)}.so"
      built.chmod(0o700)
      os.replace(built, library)  # builds may race
    return library
  except OSError as error:
    raise BuildError(explain(error, "cannot build the CPU kernels:") or str(error)) from error


def why_not_whole(library: Path) -> str | None:
  """Why a library in the cache must not be loaded; None: it may."""
  try:
    facts = library.lstat()
    if not stat.S_ISREG(facts.st_mode):
      return "it is no file"
    if facts.st_uid not in (os.getuid(), 0) or facts.st_mode & 0o022:
      return "others can change it"
    if library.stem.rpartition("-")[2] != _sha256(library):
      return "it is damaged"
  except FileNotFoundError:  # another process has just found that it must go
    return "it is gone"
  return None


def _compile(scratch: Path) -> Path:
  objects = [scratch / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cc"))]
  flags, include = [flag for flag in FLAGS if flag != "-shared"], f"-I{jax.ffi.include_dir()}"
  each = zip(sorted(SOURCES.glob("*.cc")), objects)
  _run([[*compiler(), *flags, include, "-c", str(source), "-o", str(to)] for source, to in each])
  built = scratch / "out.so"
  _run([[*compiler(), "-shared", *map(str, objects), "-o", str(built)]])
  return built


def _run(commands: list[list[str]]) -> list[str]:
  """Runs commands beside each other, and returns what each has printed. Raises BuildError when one of them fails."""
  deadline = time.monotonic() + PATIENCE_S
  pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  running: list[subprocess.Popen] = []
  try:
    for command in commands:
      # The user's own compiler (CXX), with our words: no shell reads them (S603).
      process = subprocess.Popen(command, errors="replace", start_new_session=True, **pipes)  # noqa: S603
      running.append(process)
    said = [process.communicate(timeout=max(1.0, deadline - time.monotonic())) for process in running]
  except subprocess.TimeoutExpired:
    raise BuildError(f"{commands[0][0]} has not ended within {PATIENCE_S:g} s") from None
  finally:
    for process in running:
      if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(process.pid, 9)
        process.wait()
  for process, (_, errors) in zip(running, said):
    if process.returncode:
      lines = [line for line in errors.splitlines() if line.strip()]
      worst = next((line for line in lines if "error" in line), lines[-1] if lines else "it says nothing")
      how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
      raise BuildError(f"{commands[0][0]} fails ({how}): {one_line(worst, 300)}")
  return [out for out, _ in said]


def _key() -> str:
  """Hash of everything that the built library depends on."""
  (version,) = _run([[*compiler(), "--version"]])
  digest = hashlib.sha256("\n".join([version, jaxlib.__version__, *FLAGS, *sorted(cpu_flags())]).encode())
  for path in sorted(SOURCES.iterdir()):
    digest.update(path.name.encode() + path.read_bytes())
  return digest.hexdigest()[:16]


def _sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(library: Path) -> None:
  """Removes what stands in a library's place, a folder too."""
  if library.is_dir() and not library.is_symlink():
    shutil.rmtree(library)
  else:
    library.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
  """Removes what builds that were killed have left."""
  for place in folder.glob(f"{_BUILD}*"):
    with contextlib.suppress(OSError):
      if time.time() - place.lstat().st_mtime > _STALE_S:
        shutil.rmtree(place, ignore_errors=True)


def load(names: tuple[str, ...]) -> ctypes.CDLL:
  """The library, with these symbols. Raises BuildError."""
  library = build()
  try:
    loaded = ctypes.CDLL(str(library))
  except OSError as error:
    raise BuildError(f"{library} cannot be loaded: {one_line(error, 200)}") from error
  if missing := [name for name in names if not hasattr(loaded, name)]:
    raise BuildError(f"{library} lacks {missing[0]}; delete it")
  return loaded
