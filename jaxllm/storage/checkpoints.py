"""Checkpoints: saved in the background, hashed, and checked before they are trusted.

    <run>/checkpoints/<step>/state/<params, …>/   Orbax, one directory for each top-level part of the state
                             data.json            where the run was in its data, the same for any number of processes
                             manifest.json        written last: a step without it does not exist

Orbax does what it is good at: sharded arrays, from any mesh to any mesh, off the training thread. What a
step means (commit, verification, fallback, retention) is here. All processes must see one file system.
"""

import concurrent.futures
import itertools
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from jaxllm.base.errors import CheckpointError
from jaxllm.base.files import write_atomically
from jaxllm.base.os_errors import KNOWN, explain, file_errors, number_of, reason
from jaxllm.parallel.agreement import first_does, from_first, gather, post, posted, to_first
from jaxllm.storage import manifest as manifests
from jaxllm.storage.config import CheckpointConfig
from jaxllm.storage.leaves import describe, leaf_paths, nest, num_elements, stored_form
from jaxllm.storage.reading import DATA, check_tree, committed_steps, good_step, load

log = logging.getLogger("jaxllm")
_saves = itertools.count()  # of this process's life, so of every process's: names what they tell each other


class Restored(NamedTuple):
  step: int
  state: Any
  data_state: Any


class Checkpoints:
  """The checkpoints that one training run writes and resumes from; a context manager.

  Opening it removes what a killed run left unfinished, so only the run itself may, which holds its directory
  (`jaxllm.base.locks`); readers use `restore_params`. Every process of a multi-host run makes the same calls
  in the same order, from its main thread. What they decide on is agreed: the first process looks at the disk
  and tells the others, or it is remembered from there on.
  """

  def __init__(self, directory: str | os.PathLike, config: CheckpointConfig):
    self.directory = Path(directory).absolute()
    self.config = config
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._pending: tuple[int, concurrent.futures.Future] | None = None
    self._steps: list[int] = first_does(self._open)
    self._latest = max(self._steps, default=None)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    if kind is None:
      self.close()
      return
    # This process may be the only one that ends here: the save in flight may commit, but nothing is agreed on.
    self._pool.shutdown()
    if self._pending is not None and (failure := self._pending[1].exception()) is not None:
      log.error("step %d is not saved: %s", self._pending[0], _reason(failure))

  def steps(self) -> list[int]:
    """The committed steps, oldest first, as of the last `wait`; a save still in flight is not among them."""
    return list(self._steps)

  def latest_step(self) -> int | None:
    """Where the run stands on disk: the step last saved (it may be in flight) or restored, else the newest found."""
    return self._latest if self._pending is None else self._pending[0]

  def save(self, step: int, state: Any, data_state: Any = None, metrics: Mapping[str, float] | None = None) -> None:
    """Saves `state` (a pytree of arrays), `data_state` (JSON, the same on all processes) and `metrics`.

    `metrics` are those measured at this very step. One without `config.best_metric`, or with one that is no
    number, never counts among the best.

    Returns when the arrays are safe from donation, before they are on disk, unless the config says
    otherwise. A save still in flight is waited for, and its failure raised. Later steps on disk belong to
    a course that this save abandons (someone restored an earlier step), and go when it commits.
    Raises CheckpointError when the disk is full or not writable; earlier steps stay as they are.
    """
    self.wait()
    leaves = leaf_paths(state)
    place = self.directory / str(step)
    error: BaseException | None = None
    try:
      if jax.process_index() == 0:
        if place.exists():
          place.rename(_aside(place))
        place.mkdir()
        write_atomically(place / DATA, json.dumps(data_state))
    except Exception as caught:
      error = caught
    self._agree(step, error)
    try:
      # Directories made in the background turn any early error into a wait of minutes (0.12.8).
      context = ocp.Context()
      context.asynchronous.create_directories_asynchronously = False
      with context:
        response = ocp.save_checkpointables_async(
          place / "state",
          nest({path: stored_form(leaf) for path, leaf in leaves.items() if num_elements(leaf)}),
        )
    except Exception as caught:
      error = caught
    self._agree(step, error)
    tree = {path: describe(leaf) for path, leaf in leaves.items()}
    name = f"checkpoint/{next(_saves)}"
    self._pending = step, self._pool.submit(self._commit, name, step, response, dict(metrics or {}), tree)
    if not self.config.asynchronous:
      self.wait()

  def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
    """Loads the newest good step, or exactly `step`, as (step, state, data_state).

    `abstract_state` is a pytree like the saved one whose leaves have shape, dtype and, optionally,
    sharding (`jax.ShapeDtypeStruct`); the mesh may differ from the one that saved. A damaged step is
    skipped with a warning, unless it was asked for. Raises CheckpointError when nothing good is left, or
    naming the first leaf that is missing or has another shape or dtype.
    """
    self.wait()
    step, manifest = good_step(self.directory, step)
    abstract = leaf_paths(abstract_state)
    check_tree(manifest, manifest.tree, {path: describe(leaf) for path, leaf in abstract.items()})
    place = self.directory / str(step)
    data_state = first_does(lambda: json.loads((place / DATA).read_text()))
    loaded = load(place, manifest, abstract)
    self._latest = step
    return Restored(step, jax.tree.unflatten(jax.tree.structure(abstract_state), list(loaded.values())), data_state)

  def wait(self) -> None:
    """Returns when the save in flight is committed; raises CheckpointError, on all processes, if it failed."""
    if self._pending is None:
      return
    (step, future), self._pending = self._pending, None
    error = future.exception()
    self._agree(step, error)
    self._steps, self._latest = from_first(future.result()), step

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._pool.shutdown()

  def _commit(self, name: str, step: int, response: Any, metrics: dict, tree: dict) -> list[int] | None:
    """What is left to do for a save, in the background; returns the committed steps on the first process."""
    place = self.directory / str(step)
    index, count = jax.process_index(), jax.process_count()
    try:
      _finish_writing(response, f"{name}/failed")
      digests = manifests.digests(place, manifests.files_of(place, (index, count)))
    except BaseException as error:
      post(f"{name}/failed", _reason(error))
      if index > 0:
        to_first(name, {"error": _reason(error)})
      raise
    shares = to_first(name, {"files": digests})
    if shares is None:
      # A process that leaves takes the others along, and the first is not done yet.
      while not posted(f"{name}/ended"):
        time.sleep(0.1)
      return None
    try:
      for number, share in enumerate(shares):
        if "error" in share:
          raise _OtherProcess(f"process {number}: {share['error']}")
      files = {path: digest for share in shares for path, digest in share["files"].items()}
      manifests.write(place, step, metrics, tree, files)
    finally:
      post(f"{name}/ended", True)
    self._remove_superseded(step)
    return committed_steps(self.directory)

  def _open(self) -> list[int]:
    with file_errors(self.directory, "cannot write"):
      self.directory.mkdir(parents=True, exist_ok=True)
      return self._remove_unfinished()

  def _remove_superseded(self, newest: int) -> None:
    scores = {}
    for step in committed_steps(self.directory):
      try:
        scores[step] = manifests.read(self.directory / str(step)).metrics.get(self.config.best_metric)
      except (manifests.DamagedError, CheckpointError):
        scores[step] = None
    keep = steps_to_keep(scores, newest, self.config)
    try:
      shutil.rmtree(_aside(self.directory / str(newest)), ignore_errors=True)
      for step in scores.keys() - keep:
        place = self.directory / str(step)
        (place / manifests.NAME).unlink()  # uncommitted first: a half-deleted step must not look whole
        shutil.rmtree(place)
    except OSError as error:  # the new step is saved all the same
      log.warning("%s", explain(error, "cannot remove"))

  def _clear(self) -> list[int]:
    """`_remove_unfinished`, as far as that can be done while another process may still be writing."""
    try:
      return self._remove_unfinished()
    except OSError as error:
      log.warning("%s", explain(error, "cannot remove"))
      return committed_steps(self.directory)

  def _remove_unfinished(self) -> list[int]:
    """Leaves the committed steps only, and returns them.

    Raises:
      CheckpointError: there would be none, of several: a run that is killed leaves one step without its manifest.
    """
    places = [place for place in self.directory.iterdir() if re.fullmatch(r"\d+", place.name)]
    unfinished = sorted((p for p in places if not (p / manifests.NAME).exists()), key=lambda p: int(p.name))
    if len(unfinished) == len(places) > 1 and not any(self.directory.glob("*.replaced")):
      raise CheckpointError(
        f"the checkpoints {', '.join(p.name for p in unfinished[:5])} in {self.directory} have lost their "
        f"{manifests.NAME}: put them back, or move the checkpoints away to begin anew"
      )
    for place in unfinished:
      log.warning("checkpoint step %s has no %s, so its saving did not end: it is removed", place.name, manifests.NAME)
      shutil.rmtree(place)
    for old in list(self.directory.glob("*.replaced")):
      if old.with_suffix("").exists():
        shutil.rmtree(old)
      else:
        old.rename(old.with_suffix(""))
    return committed_steps(self.directory)

  def _agree(self, step: int, error: BaseException | None) -> None:
    """Returns if no process has an error; else removes what there is of `step` and raises, on all of them."""
    errors = gather(None if error is None else _reason(error))
    if not any(errors):
      return
    self._steps = first_does(self._clear)
    if error is not None and not isinstance(error, _OtherProcess) and _disk_trouble(error) is None:
      raise error
    last = max(self._steps, default=None)
    # Who has seen it happen says it, not those who have heard of it.
    first = next((e for e in errors if e and not e.startswith("process ")), None) or next(filter(None, errors))
    raise CheckpointError(
      f"cannot save step {step} under {self.directory}: {first}; "
      + ("there is no earlier checkpoint" if last is None else f"the last good checkpoint is step {last}")
    ) from error


class _OtherProcess(Exception):
  """A save failed where another process wrote."""


def _finish_writing(response: Any, failed: str) -> None:
  """Returns when all processes have written; raises when one of them says under `failed` that it has not.

  Orbax's own barrier would wait five minutes for it. It still does, in a thread that nobody waits for before the
  program ends.
  """
  patience_s = 1.0 if jax.process_count() > 1 else None
  while True:
    try:
      return response.result(patience_s)
    except TimeoutError as error:
      if error.errno is not None:  # the file system's
        raise
    for index, why in posted(failed).items():
      raise _OtherProcess(f"process {index}: {why}")


def steps_to_keep(scores: Mapping[int, float | None], newest: int, config: CheckpointConfig) -> set[int]:
  """Which of the steps survive after saving `newest`.

  `scores` has the metric that each was saved with; the lowest are the best (the highest, where the config says so), of
  equals the newest. A step without one, or with NaN, is not among them. Steps past `newest` are of a course that it
  abandons.
  """
  steps = sorted(step for step in scores if step <= newest)
  keep = {newest, *steps[max(0, len(steps) - config.keep_last) :]}
  sign = -1 if config.highest else 1
  found = {step: score for step in steps if (score := scores[step]) is not None and math.isfinite(score)}
  ranked = sorted((sign * score, -step) for step, score in found.items())
  keep |= {-negative for _, negative in ranked[: config.keep_best]}
  if config.keep_every:
    keep |= {step for step in steps if step % config.keep_every == 0}
  return keep


def _aside(place: Path) -> Path:
  return place.with_name(place.name + ".replaced")


def _reason(error: BaseException) -> str:
  return _disk_trouble(error) or str(error) or type(error).__name__


def _disk_trouble(error: BaseException) -> str | None:
  """What to say of an error of the file system; None if it is something else (a bug of ours)."""
  number = number_of(error)
  return None if number is None else "; ".join(KNOWN.get(number) or [reason(number)])
