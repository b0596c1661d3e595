"""What the operating system refuses, said so that a person can mend it: the path, what happened, what to do.

This is the only place that turns an error of the system into words. `explain` knows it in whatever form it comes: an
OSError, or the exception of a library (Orbax, TensorStore, ArrayRecord, TensorFlow, Arrow, SentencePiece) that says it
in its text or its cause. `file_errors` makes a UserError of it; what nobody catches the doors explain.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jaxllm.base.errors import CheckpointError, UserError, one_line

# errno -> what happened, what to do about it
KNOWN = {
  errno.ENOSPC: ("the disk is full", "free some space, or choose another disk"),
  errno.EDQUOT: ("the disk quota is used up", "free some space, or ask for more"),
  errno.EFBIG: ("the file grew too large for its file system or ulimit -f", "raise the limit, or choose another disk"),
  errno.EROFS: ("the file system is read-only", "choose another place, or mount it for writing"),
  errno.EACCES: ("permission denied", "change its permissions or its folder's, or choose another place"),
  errno.EPERM: ("the operation is not permitted", "change its owner or permissions, or choose another place"),
  errno.ENOENT: ("there is no such file or folder", "check the path"),
  errno.ENOTDIR: ("a part of the path is a file and no folder", "check the path"),
  errno.EISDIR: ("it is a folder", "name a file, or move the folder away"),
  errno.EEXIST: ("it is there already", "choose another name, or move it away"),
  errno.ENOTEMPTY: ("the folder is not empty", "choose another name, or move it away"),
  errno.ELOOP: ("its links go round in a circle", "check what the links point to"),
  errno.EMFILE: ("this program has too many open files", "raise the limit (ulimit -n)"),
  errno.ENFILE: ("the system has too many open files", "end other programs, or raise fs.file-max"),
  errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
  errno.EINVAL: ("the system does not take this name or operation", "check the path and its file system"),
  errno.ESTALE: ("the network file system has lost it (stale file handle)", "mount it again, then start again"),
  errno.EIO: ("the disk or network failed (I/O error)", "look at the system's log (dmesg), then start again"),
  errno.ENODEV: ("the device is gone", "mount it again, then start again"),
  errno.ENXIO: ("the device is gone", "mount it again, then start again"),
  errno.ETIMEDOUT: ("the file system or network does not answer", "wait until it does, then start again"),
  errno.EHOSTDOWN: ("the file system's server is down", "wait until it is back, then start again"),
  errno.EBUSY: ("something else is using it", "end that first"),
  errno.ETXTBSY: ("something else is using it", "end that first"),
  errno.ENOMEM: ("the machine has too little memory", "end other programs, or ask for less at once"),
  errno.EAGAIN: ("the system has no room for more threads or locks", "raise the limit (ulimit -u), or try again"),
  errno.EBADF: ("it is closed", "redirect it to a file, or to /dev/null"),
  errno.EPIPE: ("nobody reads it any more", "redirect it to a file"),
  errno.ESPIPE: ("it is a pipe, socket or device", "name a file"),
  errno.EXDEV: ("it lies on another file system", "choose a place on the same one"),
  errno.ENOEXEC: ("it is no program for this machine", "install the right one"),
}
# A file that is not there, or whose folder is not, was lost or never written; one that cannot be read may be whole.
MISSING = (errno.ENOENT, errno.ENOTDIR)

# Those whose words mean nothing else in the text of a library's error.
_SAID = (
  *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
  *(errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ESTALE, errno.EIO),
)
_IN_WORDS = {os.strerror(number).lower(): number for number in _SAID}
_IN_WORDS |= {"can't start new thread": errno.EAGAIN, "std::bad_alloc": errno.ENOMEM}
_NUMBERS = (r"os_error_code='(\d+)'", r"\[Errno (\d+)\]", r"\berrno[:= ]+(\d+)", r"\(os error (\d+)\)")
_LONGEST = 300  # characters of a path or reason that a message repeats


def number_of(error: BaseException) -> int | None:
  """The errno of an error, or of what caused it; None: the system has nothing to do with it."""
  seen: set[int] = set()
  each: BaseException | None = error
  while each is not None and id(each) not in seen:
    seen.add(id(each))
    if isinstance(each, OSError) and each.errno is not None:
      return each.errno
    if isinstance(each, MemoryError):
      return errno.ENOMEM
    if not isinstance(each, UserError) and (found := _in_text(str(each))) is not None:
      return found
    each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
  return None


def _in_text(text: str) -> int | None:
  for pattern in _NUMBERS:
    if (found := re.search(pattern, text)) and int(found[1]) in errno.errorcode:
      return int(found[1])
  words = text.lower()
  return next((number for said, number in _IN_WORDS.items() if said in words), None)


def reason(number: int) -> str:
  """What happened, in a few words."""
  return KNOWN[number][0] if number in KNOWN else os.strerror(number).lower()


def explain(error: BaseException, doing: str = "", path: str | os.PathLike | None = None) -> str | None:
  """One line that says what the system refused and what to do; None where the error is not the system's.

  Args:
    doing: "cannot read", "cannot write", …
    path: of what; an error's own file name is more exact and comes first.
  """
  number = number_of(error)
  if number is None:
    return None
  own = getattr(error, "filename", None)
  if path is not None and own is not None and _is_part_of(own, path):
    own = None
  names = [name for name in (own, path) if isinstance(name, str | bytes | os.PathLike)]
  place = os.fsdecode(names[0]) if names else ""
  what, advice = KNOWN.get(number, (os.strerror(number).lower(), "check it, then start again"))
  if number == errno.ENOENT and place and (link := _dangling(Path(place))) is not None:
    what, advice = f"{link} is a link to {os.readlink(link)}, which is not there", "mend or remove the link"
  head = " ".join(filter(None, (doing, one_line(place, _LONGEST))))
  return one_line(f"{head}: {what}; {advice}" if head else f"{what}; {advice}")


def _is_part_of(name: object, path: str | os.PathLike) -> bool:
  """Whether a file is one under whose hidden or temporary name `path` is being written, see `jaxllm.base.files`."""
  name, asked = os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else "", os.fspath(path)
  return name == f"{asked}.tmp" or f"/.{os.path.basename(asked)}.partial" in name


def _dangling(path: Path) -> Path | None:
  """The first link on the way to a path that leads nowhere."""
  with contextlib.suppress(OSError, ValueError):
    return next((each for each in (*reversed(path.parents), path) if each.is_symlink() and not each.exists()), None)
  return None


@contextlib.contextmanager
def file_errors(
  path: str | os.PathLike, doing: str = "cannot read", kind: type[UserError] = CheckpointError
) -> Iterator[None]:
  """Turns what the system refuses within the context into one line of a UserError of this kind."""
  try:
    yield
  except OSError as error:
    line = explain(error, doing, path)
    raise kind(line or one_line(f"{doing} {os.fsdecode(path)}: {error}")) from error
