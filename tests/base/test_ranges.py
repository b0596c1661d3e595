"""Every number of the config has a range, and what is outside of it is one line that names the key."""

import dataclasses
import typing

import pytest

from jaxllm.base import settings
from jaxllm.base.errors import ConfigError
from jaxllm.base.ranges import LARGEST, Range, check, ranges
from jaxllm.config import load_config, resolve
from jaxllm.data import config as data
from jaxllm.training.config import RunConfig

# Of these `jaxllm.data.config` says itself what they may be.
EXEMPT = {cls for cls in vars(data).values() if dataclasses.is_dataclass(cls)}


def is_number(kind) -> bool:
  if typing.get_origin(kind) is typing.Literal or dataclasses.is_dataclass(kind):
    return False
  return kind in (int, float) or any(map(is_number, typing.get_args(kind)))


def classes(kind, path, seen):
  """(class, dotted key) of every group of the config, all of a tagged one's included."""
  if dataclasses.is_dataclass(kind):
    if kind not in [one for one, _ in seen]:
      seen.append((kind, path))
      for name, inner in settings.field_types(kind).items():
        classes(inner, f"{path}.{name}" if path else name, seen)
    return seen
  for inner in typing.get_args(kind):
    classes(inner, path, seen)
  return seen


GROUPS = classes(RunConfig, "", [])
FIELDS = [
  (cls, path, field.name)
  for cls, path in GROUPS
  for field in dataclasses.fields(cls)
  if is_number(settings.field_types(cls)[field.name])
]


def test_every_number_has_a_range():
  assert len(FIELDS) > 100, "they are found"
  missing = [f"{path}.{name}" for cls, path, name in FIELDS if cls not in EXEMPT and name not in ranges(cls)]
  assert not missing, f"declare the range of {', '.join(missing)}, see jaxllm.base.ranges"


def outside(one: Range):
  """Values just outside."""
  step = 1e-9
  found = [one.low - step - (one.low in (0, 1, -1))] if one.low is not None else []
  found += [one.above] if one.above is not None else []
  found += [one.high + 1] if one.high is not None else []
  found += [one.below] if one.below is not None else []
  return [*found, *one.never]


@pytest.mark.parametrize("cls, path, name", [f for f in FIELDS if f[0] not in EXEMPT], ids=lambda x: str(x)[-30:])
def test_what_is_outside_is_refused(cls, path, name):
  one = ranges(cls)[name]
  values = outside(one)
  assert values, "a range with no bound needs no test: say why beside the field, and leave it out here"
  for value in values:
    number = (
      round(value)
      if int in typing.get_args(settings.field_types(cls)[name]) + (settings.field_types(cls)[name],)
      else value
    )
    given = {"some": number} if typing.get_origin(settings.field_types(cls)[name]) is dict else number
    with pytest.raises(ConfigError) as error:
      settings.from_mapping(cls, {name: given}, path)
    said = str(error.value)
    assert said.startswith(f"{path}.{name}") or f" {path}.{name}" in said, said
    assert "\n" not in said


def test_all_defaults_are_within():
  for cls, path in GROUPS:
    values = {field.name: getattr(cls, field.name, None) for field in dataclasses.fields(cls)}
    check(cls, values, path)


@pytest.mark.parametrize(
  "one, value, wish",
  [
    (Range(0), -1, "not be negative"),
    (Range(1), 0, "be at least 1"),
    (Range(0, 1), 2, "be from 0 to 1"),
    (Range(0, below=1), 1, "be at least 0 and below 1"),
    (Range(above=0), 0, "be over 0"),
    (Range(0, LARGEST), LARGEST + 1, "be at most 2147483647"),
    (Range(0, LARGEST), -1, "not be negative"),
  ],
)
def test_the_words(one, value, wish):
  assert not one.holds(value) and one.wish(value) == wish
  assert Range().holds(1e308) and Range().holds(-1e308)


@pytest.mark.parametrize(
  "key, value, said",
  [
    ("training.ema_decay", "2", "training.ema_decay is 2.0; it must be at least 0 and below 1"),
    ("optimizer.learning_rate", "1e999", "optimizer.learning_rate is inf; it should be a number"),
    ("optimizer.learning_rate", "-1e-3", "optimizer.learning_rate is -0.001; it must not be negative"),
    ("optimizer.b2", "1.5", "optimizer.b2 is 1.5; it must be at least 0 and below 1"),
    ("optimizer.eps", "nan", "optimizer.eps is "),
    ("data.sources.5", "x", "data.sources.5: the list has 1 entries, no '5'"),
    ("data.sources.5.path", "x", "data.sources.5.path: the list has 1 entries, no '5'"),
    ("data.sources.-1.path", "x", "no '-1'"),
    ("training.steps", "9" * 40, "it must be at most 2147483647"),
    ("training.batch_size", "0", "training.batch_size is 0; it must be at least 1"),
    ("model.rope_fraction", "1.5", "model.rope_fraction is 1.5; it must be from 0 to 1"),
    ("", "1", "unknown config key"),
    (".", "1", "unknown config key"),
    ("optimizer.rules", "[{'lr_scale': -1}]", "optimizer.rules.0.lr_scale is -1.0; it must not be negative"),
  ],
)
def test_overrides_are_checked_like_keys(tmp_path, key, value, said):
  path = tmp_path / "job.py"
  path.write_text("from jaxllm.config import default_config\n\ndef get_config():\n  c = default_config()\n")
  path.write_text(path.read_text() + "  c.data.sources = [dict(path='x', name='x')]\n  return c\n")
  with pytest.raises(ConfigError) as error:
    load_config(str(path), [(key, value)])
  assert said in str(error.value), str(error.value)
  assert "\n" not in str(error.value)


def test_a_config_within_its_ranges_is_taken():
  assert resolve({"training": {"ema_decay": 0.999}}).training.ema_decay == 0.999
