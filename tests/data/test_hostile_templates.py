"""Chat templates that would take all time, memory or characters: each ends, in one short printable line."""

import pytest

from jaxllm.base.errors import DataError
from jaxllm.data.chat import render_chat

CHAT = [{"role": "user", "content": "x"}]
GROW = "{% set n = namespace(s=[1], t=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}"
GROW += "{% set n.t = [n.t, n.t] %}{% endfor %}"
# What takes the processor until it is ended; few, because each takes its second.
ENDLESS = {
  "a power": "{{ 10 ** (10 ** 9) }}",
  "nested loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
  "a list that holds itself": GROW + "{{ n.s }}",
  "lists that are compared": GROW + "{{ n.s == n.t }}",
  "a sort in a loop": "{% set x = range(99999) | list %}{% for i in x %}{{ x | sort(reverse=i % 2) }}{% endfor %}",
}
LARGE = {
  "a long text": "{{ 'a' * 10**10 }}",
  "a long list": "{{ [1] * 10**10 }}",
  "a wide number": "{{ '%1000000000d' % 1 }}",
  "a wide format": "{{ '{:1000000000}'.format(1) }}",
  "center": "{{ 'x'.center(10**10) }}",
  "the filter center": "{{ 'x' | center(10**10) }}",
  "ljust": "{{ 'x'.ljust(9**12) }}",
  "zfill": "{{ 'x'.zfill(9**12) }}",
  "expandtabs": "{{ '\t'.expandtabs(9**9) }}",
  "replace": "{{ ('a' * 9999).replace('a', 'b' * 99999).replace('b', 'c' * 9999) }}",
  "join": "{{ ('b' * 99999).join(['a'] * 99999) }}",
  "doubling": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
  "adding": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
  "a batch": "{{ range(9) | batch(10**9, 'x') | list }}",
  "much output": "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
  "just too much output": "{{ 'a' * (2**25 + 1) }}",
}
REFUSED = {
  "a range": "{{ range(10**9) | list }}",
  "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
  "a loop that calls itself": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
  "nested parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
  "nested blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
  "a long sum": "{{ " + "1+" * 20_000 + "1 }}",
  "open brackets": "{{ " + "[" * 100_000,
  "open tags": "{%" * 100_000,
  "digits": "{{ (9 ** 9999) | string }}",
  "a large float": "{{ 9.0 ** 99999 }}",
  "its classes": "{{ ''.__class__.__mro__ }}",
  "its functions": "{{ render.__globals__ }}{{ cycler.__init__.__globals__.os.popen('x') }}",
  "a change of the messages": "{% set x = messages.append(1) %}",
  "another file": "{% include '/etc/passwd' %}",
  "an import": "{% import 'os' as os %}",
  "its own words": "{{ raise_exception('x\n\x1b[31m\u202e' ~ 'a' * 100000) }}",
  "no number": "{{ 1 // 0 }}",
  "what is not there": "{{ messages[0].nothing.more }}",
  "a large template": "x" * 2_000_000,
  "half a character": "{{ raise_exception('\ud800') }}",
}


@pytest.mark.parametrize("template", (ENDLESS | LARGE | REFUSED).values(), ids=ENDLESS | LARGE | REFUSED)
def test_a_hostile_template_ends_in_one_line(template):
  with pytest.raises(DataError, match="^the chat template ") as raised:
    render_chat(template, CHAT)
  assert str(raised.value).isprintable() and len(str(raised.value)) <= 480
  assert render_chat("{{ messages[0].content }}", CHAT) == "x"


def test_limits_are_counted_in_the_processor_s_time():
  """Of one call: templates that are rendered often are not ended."""
  busy = "{% for i in range(20000) %}{% if i == 19999 %}{{ i }}{% endif %}{% endfor %}"
  assert {render_chat(busy, CHAT) for _ in range(40)} == {"19999"}


@pytest.mark.parametrize(
  "messages",
  [None, 5, "ab", {}, [], [None], [["role", "user"]], [{"role": 5}], [{"content": "a"}], [{"role": "user"}, "x"]],
  ids=ascii,
)
def test_what_is_no_chat(messages):
  with pytest.raises(DataError, match="a chat is a list"):
    render_chat("x", messages)


@pytest.mark.parametrize("more", [dict(tools=5), dict(tools=["a"]), dict(documents="ab"), dict(documents={"a": 1})])
def test_what_are_no_tools_or_documents(more):
  with pytest.raises(DataError, match="lists of JSON objects"):
    render_chat("x", CHAT, **more)


def test_deep_and_odd_values():
  deep: list = []
  for _ in range(100_000):
    deep = [deep]
  with pytest.raises(DataError, match="plain JSON values|nested too deeply"):
    render_chat("{{ messages }}", [{"role": "user", "content": deep}])
  with pytest.raises(DataError, match="plain JSON values"):
    render_chat("x", [{"role": "user", "content": {1, 2}}])
  assert render_chat("{{ messages[0].content }}", [{"role": "user", "content": "\ud83d \x00"}]) == "\ud83d \x00"
