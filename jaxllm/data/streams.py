"""Files as bytes of UTF-8: compressed ones, byte order marks, other encodings."""

import bz2
import codecs
import collections
import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import IO, Any

from jaxllm.base.errors import DataError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
  (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
  (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
  (codecs.BOM_UTF8, "utf-8-sig"),
)  # fmt: skip
MOST_BYTES = 1 << 30  # of one document: it is in memory at once, its tokens too


def is_plain(path: str, encoding: str) -> bool:
  """Whether the file's bytes are its text's, so that it can be read from the middle."""
  if encoding or path.endswith(COMPRESSED):
    return False
  with open(path, "rb") as file:
    return encoding_of(file.read(4)) in ("", "utf-8-sig")


def encoding_of(start: bytes) -> str:
  """The encoding that a byte order mark at the beginning of a text names; "" without one."""
  return next((name for mark, name in _MARKS if start.startswith(mark)), "")


def without_suffix(path: str) -> str:
  """A file's name without that of its compression."""
  return os.path.splitext(path)[0] if path.endswith(COMPRESSED) else path


@contextlib.contextmanager
def opened(path: str, encoding: str, marks: collections.Counter) -> Iterator[IO[bytes]]:
  """The file's text as bytes of UTF-8, unpacked; without a byte order mark.

  Args:
    encoding: of the text; "": as a byte order mark says, else the bytes as they are.
    marks: counts the marks by the encoding that they name.

  Raises:
    DataError: it is cut short or damaged, nothing here can unpack it, or the text is in no such encoding.
  """
  with open(path, "rb") as raw:
    try:
      file = io.BufferedReader(_unpacked(raw, path), 1 << 20)
      start = file.peek(4)[:4]
      mark = encoding_of(start) if len(start) > 3 or start == codecs.BOM_UTF8 else ""
      name = encoding or mark
      if mark:
        marks[mark] += 1
      if name == "utf-8-sig" and start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
      plain = name == "utf-8-sig" or name.lower() in ("", "utf-8", "utf8")
      yield file if plain else io.BufferedReader(_Recoded(file, name, path), 1 << 20)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
      raise DataError(f"{path} is damaged or cut short: {error}") from error
    except OSError as error:
      if error.errno is None:  # bz2's and pyarrow's, of what they cannot unpack
        raise DataError(f"{path} is damaged or cut short: {error}") from error
      raise


def _unpacked(raw: IO[bytes], path: str) -> Any:
  match os.path.splitext(path)[1]:
    case ".gz":
      return gzip.GzipFile(fileobj=raw)
    case ".bz2":
      return bz2.BZ2File(raw)
    case ".xz":
      return lzma.LZMAFile(raw)
    case ".zst":
      return _zstd(raw, path)
  return raw


def _zstd(raw: IO[bytes], path: str) -> Any:
  """Python 3.14's module, the package zstandard, or pyarrow's codec, whichever there is."""
  with contextlib.suppress(ImportError):
    from compression import zstd  # type: ignore[import-not-found]

    return zstd.ZstdFile(raw)
  with contextlib.suppress(ImportError):
    import zstandard  # type: ignore[import-not-found]

    return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
  with contextlib.suppress(ImportError):
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd")
  raise DataError(f"{path} needs a reader of zstd: pip install zstandard")


class _Recoded(io.RawIOBase):
  """A stream in UTF-8 of one in another encoding."""

  def __init__(self, file: io.BufferedReader, encoding: str, path: str):
    self._encoding, self._path, self._left = encoding, path, b""
    try:
      self._text = io.TextIOWrapper(file, encoding, "strict", newline="")
    except LookupError as error:
      raise DataError(f"a source's encoding is {encoding!r}, which Python does not know; 'latin-1', say") from error

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    if not self._left:
      try:
        self._left = self._text.read(1 << 16).encode("utf-8", "surrogatepass")
      except UnicodeDecodeError as error:
        raise DataError(
          f"{self._path} is not in the encoding {self._encoding}: {error.reason}; set the source's `encoding`"
        ) from error
    part, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
    buffer[: len(part)] = part
    return len(part)
