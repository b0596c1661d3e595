"""Loops in the machine code of a GPU kernel, as nvdisasm lists it."""

import re

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(.*)")
JUMP = re.compile(r"(BRA\S*|EXIT|RET\S*)\b\s*([^`]*)(?:`\((\.L_\w+)\))?")


def longest_loop(sass: str) -> tuple[int, int]:
  """(tensor-core cycles, other instructions) of the innermost loop that has the most tensor-core work.

  A loop is what its header dominates on a way back to it (Aho et al., Compilers, section 9.6.6): a compiler puts waits
  behind the code that they belong to, and their jumps back are no loops.
  """
  texts, successors = _graph(sass)
  dominators = _dominators(successors)
  loops: dict[int, set[int]] = {}  # header -> blocks
  for block, targets in enumerate(successors):
    for header in targets:
      if header in dominators.get(block, ()):
        loops.setdefault(header, {header}).update(_reaching(block, header, successors))
  found = []
  for body in loops.values():
    lines = [line for block in body for line in texts[block]]
    widths = [int(m.group(1)) for line in lines if (m := re.search(r"GMMA\.64x(\d+)x", line))]
    if widths:
      found.append((sum(widths) // 2, len(lines) - len(widths), body))
  innermost = [a[:2] for a in found if not any(b[2] < a[2] for b in found)]
  return max(innermost, default=(0, 0))


def _graph(sass: str) -> tuple[list[list[str]], list[list[int]]]:
  """Instructions of each basic block, and the blocks that follow it."""
  texts: list[list[str]] = [[]]
  labels: dict[str, int] = {}
  jumps: list[tuple[str | None, bool]] = []  # of each block that is done: (label, whether it may fall through)

  def close(label=None, falls=True):
    if texts[-1] or label:
      jumps.append((label, falls))
      texts.append([])

  for line in sass.splitlines():
    if label := re.match(r"^(\.L_\w+):", line):
      close()
      labels[label.group(1)] = len(texts) - 1
    elif code := INSTRUCTION.match(line):
      texts[-1].append(code.group(2))
      if jump := JUMP.match(code.group(2)):
        conditional = bool(code.group(1) or (jump.group(3) and jump.group(2).strip()))
        close(jump.group(3), conditional)
  jumps.append((None, False))
  following = []
  for block, (label, falls) in enumerate(jumps):
    targets = [block + 1] if falls and block + 1 < len(texts) else []
    following.append(targets + ([labels[label]] if label in labels else []))
  return texts, following


def _dominators(successors: list[list[int]]) -> dict[int, set[int]]:
  """The blocks that every way from the first block to a block goes through."""
  order, seen, stack = [], {0}, [(0, iter(successors[0]))]
  while stack:
    block, rest = stack[-1]
    following = next((target for target in rest if target not in seen), None)
    if following is None:
      order.append(block)
      stack.pop()
    else:
      seen.add(following)
      stack.append((following, iter(successors[following])))
  order.reverse()
  before: dict[int, list[int]] = {block: [] for block in order}
  for block in order:
    for target in successors[block]:
      before[target].append(block)
  found = {block: set(order) for block in order} | {0: {0}}
  changed = True
  while changed:
    changed = False
    for block in order[1:]:
      new = {block} | set.intersection(*(found[other] for other in before[block]))
      changed |= new != found[block]
      found[block] = new
  return found


def _reaching(block: int, header: int, successors: list[list[int]]) -> set[int]:
  """The blocks that lead to `block` without passing `header`."""
  found, stack = {header, block}, [block]
  while stack:
    at = stack.pop()
    for other in () if at == header else (b for b, targets in enumerate(successors) if at in targets):
      if other not in found:
        found.add(other)
        stack.append(other)
  return found
