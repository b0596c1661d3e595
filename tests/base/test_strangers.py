"""JSON from strangers: bounded, and taken by declared types; what a message shows of it."""

import json
from typing import Any, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.base.errors import MAX_MESSAGE, ConfigError, DataError, UserError, one_line, shown
from jaxllm.base.strangers import MAX_DEPTH, Count, Layers, Positive, Real, Size, Whole, declared, parse_json, read_json

VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
  max_leaves=12,
)


class Named(TypedDict):
  content: str


class File(TypedDict, total=False):
  size: Size
  layers: Layers
  count: Count | None
  share: Real
  scale: Positive
  on: bool
  name: str
  names: list[str]
  either: str | list[Whole]
  table: dict[str, Size]
  token: str | Named
  inner: "File"


@pytest.mark.parametrize(
  "text, message",
  [
    ("{", "is not JSON"),
    ('{"a": NaN}', "NaN is no number"),
    ('{"a": -Infinity}', "Infinity is no number"),
    ('{"a": 1e999}', "too large"),
    ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
    ('{"a": 1, "a": 2}', "'a' stands in it twice"),
    ('{"a": "\\ud800"}', "half of a character"),
    ("[" * 100_000, "nested deeper"),
    ('{"a":' * 100 + "1" + "}" * 100, "nested deeper"),
    (b"\xff\xfe{", "not UTF-8"),
    ("[1]", "no JSON object"),
    ('"a"', "no JSON object"),
    ("", "is not JSON"),
    ('{"a": "\x01"}', "is not JSON"),
  ],
)
def test_what_is_no_json_object_is_refused_in_a_line(tmp_path, text, message):
  (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
  with pytest.raises(DataError, match=message) as raised:
    read_json(tmp_path / "x.json", error=DataError)
  assert str(raised.value).isprintable() and len(str(raised.value)) <= MAX_MESSAGE


def test_a_file_that_is_too_large_is_not_read(tmp_path):
  (tmp_path / "x.json").write_text(json.dumps({"a": "b" * 200}))
  with pytest.raises(UserError, match="at most 100"):
    read_json(tmp_path / "x.json", max_bytes=100)
  with pytest.raises(UserError, match="has no y.json"):
    read_json(tmp_path / "y.json")
  (tmp_path / "z.json").mkdir()
  with pytest.raises(UserError, match="cannot read"):
    read_json(tmp_path / "z.json")


@given(VALUES)
def test_other_json_is_read_as_the_library_reads_it(value):
  text = json.dumps({"a": value}, ensure_ascii=True)
  try:
    text.encode()
    json.dumps({"a": value}, allow_nan=False, ensure_ascii=False).encode()
  except ValueError:
    with pytest.raises(DataError):
      parse_json(text, "it", DataError)
    return
  assert parse_json(text, "it", DataError) == json.loads(text)


def test_a_byte_order_mark_and_brackets_in_texts_are_no_matter():
  assert parse_json('\ufeff{"a": 1}'.encode(), "it") == {"a": 1}
  assert parse_json(json.dumps(["[" * 200, '\\"{' * 200]), "it") == ["[" * 200, '\\"{' * 200]
  deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
  assert json.dumps(parse_json(deep, "it")) == deep


@pytest.mark.parametrize(
  "values, taken",
  [
    ({"size": "32"}, {"size": 32}),
    ({"size": 32.0}, {"size": 32}),
    ({"size": "32.0"}, {"size": 32}),
    ({"share": "1e-5"}, {"share": 1e-5}),
    ({"share": 3}, {"share": 3.0}),
    ({"size": None, "count": None}, {"count": None}),
    ({"either": "a"}, {"either": "a"}),
    ({"either": [1, "2"]}, {"either": [1, 2]}),
    ({"table": {"a": "3"}}, {"table": {"a": 3}}),
    ({"token": {"content": "a", "other": 1}, "more": object}, {"token": {"content": "a"}}),
    ({"inner": {"inner": {"on": True}}}, {"inner": {"inner": {"on": True}}}),
  ],
)
def test_values_are_of_their_declared_types(values, taken):
  found = declared(File, values, "it")
  assert found == taken and repr(found) == repr(taken)  # 1 is not True


@pytest.mark.parametrize(
  "values",
  [
    *({"size": value} for value in (0, -1, 10**12, 10**400, True, 0.5, 1e308, "x", "1_0_", " ", [1], {}, "9" * 100)),
    *({"layers": value} for value in (10**9, "1e9", 4097)),
    *({"share": value} for value in (float("nan"), "inf", "nan", 10**400, False, "1e400", [], "")),
    *({"on": value} for value in (0, 1, "true", "", [])),
    *({"name": value} for value in (0, ["a"], {})),
    *({"names": value} for value in ("a", {"a": 1}, [1], [["a"]])),
    *({"table": value} for value in ([], "a", {"a": "b"}, {"a": 0})),
    *({"token": value} for value in (1, {}, {"content": 1}, ["a"])),
    {"scale": 0},
    {"inner": {"inner": {"on": 1}}},
    {"inner": "a\nb\x1b[31m" * 1000},
  ],
  ids=lambda values: ascii(values)[:40],
)
def test_values_of_other_types_are_refused_in_a_line(values):
  with pytest.raises(ConfigError, match=f"^it: key {next(iter(values))}") as raised:
    declared(File, values, "it")
  assert str(raised.value).isprintable() and len(str(raised.value)) < 300


@given(st.dictionaries(st.sampled_from(sorted(File.__annotations__)), VALUES))
def test_no_value_gets_through_that_is_not_of_its_type(values):
  try:
    found: dict[str, Any] = declared(File, values, "it")
  except ConfigError as error:
    assert str(error).isprintable() and len(str(error)) <= MAX_MESSAGE
    return
  kinds = {"size": int, "layers": int, "share": float, "scale": float, "on": bool, "name": str, "names": list}
  assert all(type(found[name]) is kind for name, kind in kinds.items() if name in found)
  assert 1 <= found.get("layers", 1) <= 4096


@given(st.text() | st.binary() | VALUES)
def test_messages_are_one_short_printable_line(value):
  assert shown(value).isprintable() and len(shown(value)) < 100
  error = UserError(f"it is {shown(value)}, and {value}" + "x" * 1000)
  assert str(error).isprintable() and len(str(error)) <= MAX_MESSAGE


def test_a_message_keeps_its_words():
  assert one_line("a \u00e9 \u4e2d") == "a \u00e9 \u4e2d"
  assert one_line("first\n  second\r\nthird \x1b[2J\u202e\ud800") == "first second third \\x1b[2J\\u202e\\ud800"
  assert one_line("begin" + "x" * 1000 + "end").startswith("beginx") and one_line("x" * 1000 + "end").endswith("end")
  assert shown(10**5000) == "a int that is too large to show" and shown("a" * 10**6) == repr("a" * 60) + "..."


def test_a_text_without_an_end_takes_no_square_of_its_length():
  with pytest.raises(UserError, match="nested deeper"):
    parse_json("[" * 70 + '"' + '\\"' * 500_000, "it")  # hours, where each quote is tried as a beginning
