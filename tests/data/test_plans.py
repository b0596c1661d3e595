"""Plans that are kept beside the data are those that would be made."""

import pickle
import threading

import numpy as np
import pytest

from jaxllm.data import arrays, packing, plans
from jaxllm.data.manifest import open_prepared
from jaxllm.data.packing import make_plan, order_in_parts, random_order
from jaxllm.data.pipeline import train_batches


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_the_order_in_parts(at_once, monkeypatch):
  monkeypatch.setattr(packing, "_BLOCK", 64)
  whole = random_order(500, 3, 4)
  assert sorted(whole) == list(range(500))
  bits = np.random.Philox(key=np.array([3, 4], np.uint64)).random_raw(500)
  assert whole.tolist() == np.argsort(bits, kind="stable").tolist()
  parts = list(order_in_parts(500, 3, 4, at_once))
  assert np.concatenate(parts).tolist() == whole.tolist()
  assert max(map(len, parts)) < 4 * at_once + 20


def slow_best_fit(costs, capacity, open_rows):
  """The loop over all open rows, of which the fullest that has room takes the piece."""
  rows, room, row_of_slot = [], np.zeros(open_rows, int), np.zeros(open_rows, int)
  count = next_slot = 0
  for cost in costs:
    if cost == capacity:
      rows.append(count)
      count += 1
      continue
    slots = np.flatnonzero(room >= cost)
    if len(slots):
      slot = slots[np.argmin(room[slots])]
    else:
      slot, next_slot = next_slot, (next_slot + 1) % open_rows
      room[slot], row_of_slot[slot] = capacity, count
      count += 1
    room[slot] -= cost
    rows.append(int(row_of_slot[slot]))
  return rows, count


@pytest.mark.parametrize("open_rows", [3, 512])
def test_best_fit_is_the_slow_one(open_rows, monkeypatch):
  monkeypatch.setattr(packing, "_OPEN_ROWS", open_rows)
  draw = np.random.default_rng(0)
  for capacity in (5, 64, 1000):
    costs = draw.integers(1, capacity + 1, 400)
    rows, count = packing._best_fit(costs, capacity)
    assert (rows.tolist(), count) == slow_best_fit(costs, capacity, open_rows)


@pytest.fixture
def kept(mixture, monkeypatch):
  """The mixture, whose plans are kept."""
  import shutil

  monkeypatch.setattr(plans, "_SMALL", 1)
  yield mixture
  shutil.rmtree(open_prepared(mixture).root / "plans", ignore_errors=True)
  arrays._opened.clear()


def rows_of(config, count=40):
  import dataclasses

  batches = train_batches(dataclasses.replace(config, prefetch=0), batch_size=3, seq_len=24, seed=0)
  return [next(batches)["inputs"].copy() for _ in range(count)]


@pytest.mark.parametrize("way", ["split", "best_fit", "first_fit", "none"])
def test_kept_plans_give_the_same_rows(mixture, kept, way, monkeypatch):
  import dataclasses

  config = dataclasses.replace(mixture, packing=way)
  monkeypatch.setattr(plans, "_SMALL", 1 << 16)
  expected = rows_of(config)
  assert not (open_prepared(config).root / "plans").exists()
  monkeypatch.setattr(plans, "_SMALL", 1)
  for _ in range(2):
    assert all((a == b).all() for a, b in zip(rows_of(config), expected, strict=True))
  assert (open_prepared(config).root / "plans").exists()


def test_a_plan_is_made_once_and_mended(kept, monkeypatch):
  import dataclasses

  config = dataclasses.replace(kept, packing="best_fit")
  expected = rows_of(config, 3)
  made = []
  original = packing._best_fit
  monkeypatch.setattr(packing, "_best_fit", lambda *a: made.append(1) or original(*a))
  arrays._opened.clear()  # as in another process
  assert all((a == b).all() for a, b in zip(rows_of(config, 3), expected))
  assert not made
  file = next((open_prepared(config).root / "plans").glob("*/documents.npy"))
  data = file.read_bytes()
  file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  arrays._opened.clear()
  assert all((a == b).all() for a, b in zip(rows_of(config, 3), expected))
  assert made == [1] and file.read_bytes() == data


def test_many_at_once_make_it_once(tmp_path):
  made, found = [], []

  def make():
    made.append(1)
    for part in range(3):
      yield {"x": np.arange(10) + 10 * part}

  threads = [
    threading.Thread(target=lambda: found.append(arrays.kept_arrays(tmp_path / "here" / "it", make))) for _ in range(8)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert made == [1]
  assert all(one["x"].tolist() == list(range(30)) for one in found)
  assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["it", "lock"]


def test_a_directory_that_cannot_be_written(tmp_path, caplog):
  (tmp_path / "file").write_text("")
  assert arrays.kept_arrays(tmp_path / "file" / "sub", lambda: iter(())) is None
  assert "is made at every start" in caplog.text


def test_mapped_arrays_travel_as_paths(tmp_path):
  np.save(tmp_path / "a.npy", np.arange(100_000))
  array = arrays.mapped(tmp_path / "a.npy")
  data = pickle.dumps(make_plan("split", array, 10, 0))
  assert len(data) < 2000
  assert pickle.loads(data).lengths.tolist() == list(range(100_000))
  assert pickle.loads(pickle.dumps(array[5:8])).tolist() == [5, 6, 7]
