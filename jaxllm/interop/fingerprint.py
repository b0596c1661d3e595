"""Digests of models in files: whether what a run began with is still what it was."""

import hashlib
from pathlib import Path
from typing import Any

from jaxllm.base.errors import CheckpointError
from jaxllm.interop.directory_files import CHECKPOINTS, CONFIG_FILE, START, START_ADAPTER, START_FILE, read_start
from jaxllm.interop.model_directory import PARAMS
from jaxllm.interop.peft_config import CONFIG_FILE as ADAPTER_FILE
from jaxllm.interop.peft_config import base_of, is_adapter
from jaxllm.storage.manifest import NAME as MANIFEST
from jaxllm.storage.reading import committed_steps


def check_unchanged(directory: Path, record: dict[str, Any]) -> None:
  """That the model and the adapter which a run began with are what they were then.

  Args:
    directory: the run's. record: its start.json.

  Raises:
    CheckpointError: they are not, so that what the run has trained does not belong to them.
  """
  for name, digest in (("path", "digest"), ("adapter", "adapter_digest")):
    if record.get(digest) and fingerprint(Path(record[name]), record["step"], name == "adapter") != record[digest]:
      raise CheckpointError(f"{directory} began with {record[name]}, which has changed since; put back what was there")


def _of_weights(file: Path) -> bool:
  return file.suffix in (".safetensors", ".bin") or file.name in (CONFIG_FILE, ADAPTER_FILE) or ".index." in file.name


def fingerprint(path: Path, step: int | None = None, alone: bool = False) -> str:
  """The SHA-256 of a model's weights in files, with their names, and of those of the models that it stands on.

  A config that says what the weights are is one of these files; a tokenizer's and settings of generation are not. Of a
  training run: of the manifests of its checkpoints, which have the digest of every file.

  Args:
    step: of a run; None: the latest. alone: an adapter without its base, which may be another one.
  """
  under: list[str] = []
  if path.is_file():
    files = [path]
  elif (path / CHECKPOINTS).is_dir():
    step = max(committed_steps(path / CHECKPOINTS), default=None) if step is None else step
    files = [path / CHECKPOINTS / str(step) / MANIFEST]
    files += [path / name / "0" / MANIFEST for name in (START, START_ADAPTER) if (path / name).is_dir()]
    if (path / START_FILE).is_file():
      record = read_start(path)
      if record["path"] != START:
        under.append(fingerprint(Path(record["path"]), record["step"]))
      if record["adapter"]:
        under.append(fingerprint(Path(record["adapter"]), alone=True))
  else:
    found = (file for folder in (path, path / PARAMS) for file in sorted(folder.glob("*")))
    files = [file for file in found if file.is_file() and _of_weights(file)]
    if is_adapter(path) and not alone:
      under.append(fingerprint(base_of(path)))
  digest = hashlib.sha256()
  for file in files:
    digest.update(file.relative_to(path.parent).as_posix().encode())
    with file.open("rb") as data:
      digest.update(hashlib.file_digest(data, "sha256").digest())
  for other in under:
    digest.update(other.encode())
  return digest.hexdigest()
