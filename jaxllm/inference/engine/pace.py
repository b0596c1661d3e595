"""Whether drafts pay: how many of them hold, and what a step takes with them and without."""

import dataclasses

from jaxllm.inference.engine.sizes import Shape

WEIGHT = 0.2  # of what was seen last
PROBE = 32  # steps after which drafts are tried again where they did not pay


@dataclasses.dataclass
class Trust:
  """How many of one request's drafts have held, and so how many are worth asking for."""

  most: int
  share: float = 1.0  # of drafts that held, lately; at first one hopes

  def __post_init__(self):
    self.length = self.most

  def note(self, drafted: int, held: int) -> None:
    """So many of a step's drafts held. If all did, the next step asks for twice as many, else for one more."""
    self.share += WEIGHT * (held / drafted - self.share)
    self.length = min(self.most, 2 * self.length if held == drafted else held + 1)

  def expected(self, drafts: int) -> float:
    """How many of so many drafts will hold, each where those before it do."""
    return sum(self.share**i for i in range(1, drafts + 1))


class Pace:
  """Seconds of steps, by their shape. It changes when text comes, never which."""

  def __init__(self):
    self._seconds: dict[Shape, float | None] = {}
    self._without = 0  # steps since drafts were tried

  def note(self, shape: Shape, seconds: float) -> None:
    """What a step took. A shape's first step may have been compiled, and counts for nothing."""
    if shape not in self._seconds:
      self._seconds[shape] = None
      return
    known = self._seconds[shape]
    self._seconds[shape] = seconds if known is None else known + WEIGHT * (seconds - known)

  def worth(self, plain: Shape, drafted: Shape, rows: int, held: float) -> bool:
    """Whether a step of `rows` rows with drafts, of which `held` are expected to hold, gives more tokens a second than
    one without; also where that is not known yet, or was found out long ago."""
    without, beside = self._seconds.get(plain), self._seconds.get(drafted)
    pays = without is None or beside is None or (rows + held) * without > rows * beside
    self._without = 0 if pays or self._without >= PROBE else self._without + 1
    return pays or self._without == 0
