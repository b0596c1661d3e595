"""Text and bytes: documents are bytes everywhere, so that what is not UTF-8 survives too."""


def to_bytes(text: str | bytes) -> bytes:
  """UTF-8 bytes of `text`; bytes smuggled in as surrogates (PEP 383) become themselves again.

  Other lone surrogates, which JSON can spell as "\\ud800", take their three-byte form.
  """
  if isinstance(text, bytes):
    return text
  try:
    return text.encode("utf-8", "surrogateescape")
  except UnicodeEncodeError:
    return text.encode("utf-8", "surrogatepass")


def is_utf8(data: bytes) -> bool:
  try:
    data.decode()
  except UnicodeDecodeError:
    return False
  return True
