"""Whether drafts pay, with clocks and acceptances that are given."""

import pytest

from jaxllm.inference.engine.pace import PROBE, Pace, Trust
from jaxllm.inference.engine.sizes import Shape

PLAIN, DRAFTED = Shape(1, 1), Shape(1, 5, 4)


def paced(plain, drafted):
  pace = Pace()
  for shape, seconds in ((PLAIN, plain), (DRAFTED, drafted)):
    pace.note(shape, 100.0)  # compiled
    pace.note(shape, seconds)
  return pace


def test_what_gives_more_tokens_a_second():
  assert paced(1.0, 1.5).worth(PLAIN, DRAFTED, 1, held=0.6)
  assert not paced(1.0, 1.5).worth(PLAIN, DRAFTED, 1, held=0.4)
  assert not paced(1.0, 1.5).worth(PLAIN, DRAFTED, 4, held=1.6)
  assert Pace().worth(PLAIN, DRAFTED, 1, held=0.0)  # nobody knows yet


def test_tried_again_after_a_while():
  pace = paced(1.0, 2.0)
  tried = [pace.worth(PLAIN, DRAFTED, 1, held=0.1) for _ in range(2 * PROBE + 2)]
  assert tried == ([False] * PROBE + [True]) * 2


def test_trust_follows_what_holds():
  trust = Trust(8)
  assert (trust.length, trust.expected(3)) == (8, 3)
  trust.note(8, 2)
  assert trust.length == 3 and trust.share == pytest.approx(0.85)
  trust.note(3, 3)
  assert trust.length == 6
  for _ in range(60):
    trust.note(trust.length, 0)
  assert trust.length == 1 and trust.expected(8) < 1e-4
