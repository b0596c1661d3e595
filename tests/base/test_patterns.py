"""Patterns of strangers: `re`'s meaning, whichever way they are matched, and an end."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.base import patterns
from jaxllm.base.errors import ConfigError

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.12.mlp.down_proj", "lm_head", "", "a" * 60]
HOSTILE = [
  "(a+)+b",
  "(?:(?:[a-z]+\\.?)+)+!",
  ".*" * 14 + "!",
  "((a|[a-z_.0-9])+)+!",
  "(a|aa)*b",
]


@pytest.mark.parametrize("how", ["match", "fullmatch", "search"])
@pytest.mark.parametrize(
  "pattern",
  [
    *("q_proj", r".*\.(q|v)_proj", r"(.*\.)?(layers\.[0-9]+\.mlp.*)$", r".*layers\.(\d+)\."),
    *(
      r"(?i).*Q_PROJ",
      "(x)?",
      "",
      r"(?:.*\.)+(\d+)\.(?:[a-z]+_?)+\.(?:q|k)_proj",
      r"^(?!.*lm_head).*$",
      r"(a){2,}(b)?",
    ),
  ],
)
def test_a_pattern_means_what_it_means_to_re(how, pattern):
  for module in MODULES:
    match = getattr(re, how)(pattern, module)
    wanted = None if match is None else match[match.re.groups] or ""
    assert patterns.find(pattern, module, how) == wanted


@settings(max_examples=40)
@given(st.from_regex(r"[ab.|?*()+]{0,8}", fullmatch=True), st.text("ab.", max_size=6))
def test_any_pattern(pattern, text):
  try:
    wanted = re.fullmatch(pattern, text) is not None
  except re.error:
    with pytest.raises(ConfigError, match="not a regular expression"):
      patterns.matches(pattern, text)
    return
  assert patterns.matches(pattern, text) == wanted


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_pattern_that_would_take_for_ever_is_refused(pattern):
  with pytest.raises(ConfigError, match="^here: the pattern .* takes too long to match") as raised:
    patterns.prepare("here", [pattern], ["a" * 60])
  assert str(raised.value).isprintable()


@pytest.mark.parametrize(
  "pattern", ["(", "[", "(" * 100_000, "a**", "(?P<a>b)(?P<a>c)", "(?<=a*)b", "\\", "x{99999999999}"]
)
def test_what_is_no_pattern_is_refused(pattern):
  with pytest.raises(ConfigError, match="regular expression|too long"):
    patterns.prepare("here", [pattern], ["a"])


def test_many_patterns_are_matched_once(monkeypatch):
  slow = [rf"(?:.*\.)+{i}\.q_proj" for i in range(5)]
  patterns.prepare("here", slow, MODULES)
  monkeypatch.setattr(patterns.bounded, "run", None)  # all is known
  assert not any(patterns.matches(pattern, module) for pattern in slow for module in MODULES)


def test_what_was_found_does_not_depend_on_what_is_kept(monkeypatch):
  """Where there is no room for more, what a call has found before is known to it all the same."""
  monkeypatch.setattr(patterns, "MAX_KEPT", 4)
  monkeypatch.setattr(patterns, "_found", {})
  pattern, texts = "(?:(?:a|b)+c)+", ["abc", "x", "ac", "acbc", "", "cc"]
  for some in (texts[:3], texts, texts[1:] * 2):
    found = patterns._find("fullmatch", pattern, some)
    assert [each is not None for each in found] == [re.fullmatch(pattern, text) is not None for text in some]
