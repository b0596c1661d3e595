"""Mappings to dataclasses: what each type takes, tagged groups, and the way back."""

import dataclasses
import json
from typing import ClassVar, Literal

import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.base.settings import Text, from_mapping, keys, to_mapping


@dataclasses.dataclass(frozen=True)
class Circle:
  name: ClassVar[str] = "circle"
  radius: float = 1.0


@dataclasses.dataclass(frozen=True)
class Square:
  name: ClassVar[str] = "square"
  side: int = 2
  colour: Literal["red", "blue"] = "red"


@dataclasses.dataclass(frozen=True)
class Frame:
  width: float = 0.5


@dataclasses.dataclass(frozen=True)
class Drawing:
  shape: Circle | Square = Circle()
  hole: Circle | Square | None = None
  frame: Frame | None = None
  sizes: tuple[int, ...] = ()
  title: str = ""


@pytest.mark.parametrize(
  "values, want",
  [
    ({}, Drawing()),
    ({"shape": {"name": "square", "side": 3.0}}, Drawing(shape=Square(3))),
    ({"shape": {"radius": 2}}, Drawing(shape=Circle(2.0))),
    ({"shape": Text("{'name': 'square'}")}, Drawing(shape=Square())),
    ({"hole": {"name": Text("square"), "colour": Text("blue")}}, Drawing(hole=Square(colour="blue"))),
    ({"hole": Text("none"), "frame": {}}, Drawing(frame=Frame())),
    ({"sizes": Text("(1, 2.0)"), "title": Text("(1, 2.0)")}, Drawing(sizes=(1, 2), title="(1, 2.0)")),
  ],
)
def test_what_a_mapping_means(values, want):
  assert from_mapping(Drawing, values) == want


@pytest.mark.parametrize(
  "values, message",
  [
    ({"shape": {"name": "cirle"}}, r"shape\.name is 'cirle'; choose one of 'circle', 'square'; did you mean 'circle'"),
    ({"shape": {"side": 3}}, r"shape\.side belongs to shape\.name 'square', not to 'circle'"),
    ({"shape": {"name": "square", "sid": 3}}, r"unknown config key shape\.sid; did you mean shape\.side\?"),
    ({"shape": {"name": "square", "colour": "green"}}, r"shape\.colour is 'green'; choose one of 'red', 'blue'"),
    ({"shape": None}, r"config shape is None; it should be a group of keys with a name"),
    ({"shape": 3}, r"config shape is 3; it should be a group"),
    ({"frame": 3}, r"config frame is 3; it should be a group"),
    ({"sizes": 3}, r"sizes is 3; it should be a list"),
    ({"sizes": [1, "two"]}, r"sizes\.1 is 'two'; it should be a whole number"),
    ({"sizes": [True]}, r"sizes\.0 is True; it should be a whole number"),
    ({"shape": {"radius": float("inf")}}, r"shape\.radius is inf; it should be a number"),
    ({"shape": {"radius": Text("nan")}}, r"shape\.radius is 'nan'; it should be a number"),
    ({"title": 3}, r"title is 3; it should be a string"),
    ({3: 3}, r"unknown config key 3; known: shape, hole, frame, sizes, title"),
    ([], r"config file is \[\]; it should be a group of keys"),
  ],
)
def test_what_it_does_not_mean(values, message):
  with pytest.raises(ConfigError, match=message) as error:
    from_mapping(Drawing, values)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("drawing", [Drawing(), Drawing(Square(3), Circle(0.5), Frame(), (1, 2), "x")])
def test_there_and_back(drawing):
  mapping = json.loads(json.dumps(to_mapping(drawing)))
  assert from_mapping(Drawing, mapping) == drawing


def test_every_key():
  assert dict(keys(Drawing(Square(), sizes=(1,)))) == {
    "shape.name": "square", "shape.side": 2, "shape.colour": "red", "hole": None, "frame": None, "sizes": (1,),
    "title": "",
  }  # fmt: skip
