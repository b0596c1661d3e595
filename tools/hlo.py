"""Reading the text of compiled programs: which collectives a program runs, in which loops and over which mesh axes.

    found = collectives(compiled.as_text(), mesh)

`compiled` is of `jax.jit(...).lower(...).compile()` for any platform. Loops are told apart by the file whose scan they
come from, which the compiler notes beside every instruction.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import jax
import numpy as np

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# File with a scan -> what its loop goes over. Of the files that a loop comes from the innermost of these counts.
LOOPS = {
  "training/step.py": "micro-batches",
  "models/stack.py": "layers",
  "kernels/head_loss/chunks.py": "head loss",
}
RING = "ring"  # a loop that XLA made of a gathered or scattered factor of a product, piece by piece
OTHER = "other loop"


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of a program; the two ends of an asynchronous one are one."""

  kind: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each array, on one device
  loops: tuple[str, ...]  # that it stands in, outermost first
  times: int | None  # a program run, on each device; None: a loop of unknown length
  axes: tuple[str, ...]  # of the mesh, along which the devices of a group differ
  file: str  # of the package, innermost, from which it comes
  op_name: str

  @property
  def shape(self) -> str:
    """As HLO writes it, without layouts."""
    texts = [f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in self.arrays]
    return texts[0] if len(texts) == 1 else f"{texts[0]} and {len(texts) - 1} more"

  @property
  def bytes(self) -> int:
    """Of the whole array that is reduced, gathered or sent, once: not what a certain algorithm moves over links."""
    return sum(math.prod(shape) * _size(dtype) for dtype, shape in self.arrays)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO."""

  name: str
  type: str
  op: str
  operands: tuple[str, ...]
  rest: str  # from the operands on

  def attribute(self, name: str) -> str | None:
    """A computation's name, or a number."""
    found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
    return found.group(1) if found else None

  @property
  def called(self) -> list[str]:
    """The computations that it runs once."""
    names = [self.attribute(name) for name in ("calls", "true_computation", "false_computation")]
    if self.op == "call":
      names.append(self.attribute("to_apply"))
    for listed in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", self.rest):
      names += re.findall(r"%?([\w.-]+)", listed)
    return [name for name in names if name]


class Program:
  """The computations of a module."""

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ""
    current: list[Instruction] | None = None
    for line in text.splitlines():
      if head := re.match(r"^(ENTRY )?%?([\w.-]+) .*\{$", line):
        current = self.computations.setdefault(head.group(2), [])
        self.entry = head.group(2) if head.group(1) else self.entry
      elif line.startswith("}"):
        current = None
      elif current is not None and (one := _instruction(line)):
        current.append(one)
    if not self.entry:
      raise ValueError("no HLO text of a compiled program: it has no ENTRY")
    self._frames = _frames(text)

  def find(self, computation: str, name: str) -> Instruction | None:
    """An instruction by name."""
    return next((one for one in self.computations[computation] if one.name == name), None)

  def files(self, one: Instruction) -> list[str]:
    """The source files that an instruction comes from, innermost first, as far as the program tells."""
    if frame := one.attribute("stack_frame_id"):
      return self._frames.get(int(frame), [])
    found = re.search(r'source_file="([^"]*)"', one.rest)
    return [found.group(1)] if found else []

  def trips(self, loop: Instruction) -> int | None:
    """How often a while loop runs, where it counts a number up to a constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
      return int(known.group(1))
    condition, body = self.computations[loop.attribute("condition")], self.computations[loop.attribute("body")]
    values = {one.name: one for one in condition}
    compare = condition[-1]
    if compare.op != "compare" or compare.attribute("direction") != "LT":
      return None
    counter, limit = (values.get(name) for name in compare.operands)
    if counter is None or limit is None or counter.op != "get-tuple-element" or limit.op != "constant":
      return None
    index = int(counter.attribute("index"))
    step = self._step(loop.attribute("body"), body[-1].operands[index], index) if body[-1].op == "tuple" else None
    # A loop that starts elsewhere than at 0 would need its first value too; XLA and jax make none.
    return -(-int(_number(limit)) // step) if step else None

  def _step(self, computation, name, index):
    """What an iteration adds to the loop's counter, or None."""
    added = 0
    while (one := self.find(computation, name)) is not None:
      if one.op in ("copy", "bitcast", "convert"):
        name = one.operands[0]
      elif one.op == "add":
        first, second = (self.find(computation, operand) for operand in one.operands)
        if first is not None and first.op == "constant":
          first, second = second, first
        if first is None or second is None or second.op != "constant":
          return None
        added, name = added + int(_number(second)), first.name
      elif one.op == "get-tuple-element" and (source := self.find(computation, one.operands[0])) is not None:
        return added if source.op == "parameter" and int(one.attribute("index")) == index else None
      else:
        return None
    return None


def collectives(text: str, mesh: jax.sharding.Mesh) -> list[Collective]:
  """The collectives of a compiled program's text, those in loops and called computations included.

  Args:
    mesh: the one it was compiled for; an id in the program is a device's place in it.

  Raises:
    ValueError: the text is no HLO, or writes groups of devices in a form that is unknown here.
  """
  program = Program(text)
  return list(_walk(program, program.entry, (), 1, mesh))


def _walk(program, computation, loops, times, mesh, fusion=None, met=None) -> Iterator[Collective]:
  """fusion: the instruction that calls this computation, if it is one. met: in the fusions of this loop so far."""
  met = set() if met is None else met
  for one in program.computations[computation]:
    kind = one.op.removesuffix("-start")
    if kind in KINDS:
      if fusion is not None:
        key = (one.attribute("channel_id"), one.op, one.type)
        if key in met:  # TPUs fuse the parts of an asynchronous one with what runs meanwhile, and each part names it
          continue
        met.add(key)
      groups = _groups(one, mesh.size)
      if computation.startswith("all-reduce-scatter"):  # as TPUs write it: the sum, of which a part is kept
        kind = "reduce-scatter"
      told = one if fusion is None or program.files(one) else fusion
      files = program.files(told)
      yield Collective(
        kind,
        _payload(one, max(map(len, groups))),
        loops,
        times,
        _axes(groups, mesh),
        _own(files[0]) if files else "",
        (re.search(r'op_name="([^"]*)"', told.rest) or ("", ""))[1],
      )
    elif one.op == "while":
      trips = program.trips(one)
      inside = None if times is None or trips is None else times * trips
      for called in (one.attribute("body"), one.attribute("condition")):
        yield from _walk(program, called, (*loops, _loop(program, one, loops)), inside, mesh)
    else:
      for called in one.called:
        yield from _walk(program, called, loops, times, mesh, one if one.op == "fusion" else fusion, met)


def _loop(program, one, outer):
  body = one.attribute("body")
  if "windowed_dot_general" in body:
    return RING
  loop = _named(program.files(one))
  if loop is None:  # the compiler gave it the origin of some instruction within: what do most of them say?
    votes = collections.Counter(_named(program.files(inside)) for inside in program.computations[body])
    del votes[None]
    loop = votes.most_common(1)[0][0] if votes else OTHER
  return OTHER if loop in outer else loop


def _named(files):
  return next((loop for file in files for end, loop in LOOPS.items() if file.endswith(end)), None)


def _own(file):
  return file.rpartition("/jaxllm/")[2] if "/jaxllm/" in file else file.rpartition("/")[2]


# ---------------------------------------------------------------- a line


def _instruction(line) -> Instruction | None:
  found = re.match(r"^\s+(?:ROOT )?%?([\w.-]+) = ", line)
  if not found:
    return None
  right = line[found.end() :]
  depth, end = 0, 0
  while depth or right[end] != " ":  # the type ends at the first space outside of brackets
    depth += (right[end] in "({[") - (right[end] in ")}]")
    end += 1
  op, _, rest = right[end + 1 :].partition("(")
  arguments = re.match(r"[^()]*", rest).group(0)
  return Instruction(found.group(1), right[:end], op, tuple(re.findall(r"%([\w.-]+)", arguments)), rest)


def _number(constant):
  return constant.rest.partition(")")[0]


def _size(dtype):
  bits = re.search(r"\d+", dtype)
  return 1 if bits is None or int(bits.group()) < 8 else int(bits.group()) // 8


def _payload(one, group):
  plain = re.sub(r"\{[^{}]*\}", "", one.type)  # layouts
  arrays = [
    (dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", plain)
  ]
  count = len(one.operands)
  if one.op.endswith("-start") and len(arrays) >= 2 * count:  # operands, results, and what the chip needs beside
    arrays = arrays[count : 2 * count]
  if one.op.startswith("reduce-scatter"):  # what is reduced is as large as the group's results together
    arrays = [(dtype, (group, *shape)) for dtype, shape in arrays]
  return tuple(arrays)


# ---------------------------------------------------------------- who talks to whom


def _groups(one, devices) -> list[list[int]]:
  """The devices of each group, as places in the mesh."""
  if pairs := re.search(r"source_target_pairs=\{([{}\d,]*)\}", one.rest):
    return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))]
  text = one.rest.partition("replica_groups=")[2]
  if text.startswith("{}") or not text:
    return [list(range(devices))]
  if text.startswith("{{"):
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text[: text.index("}}") + 2])]
  iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
  if found := re.match(r"\[(\d+),(\d+)\]<=" + iota, text):
    rows, columns, *ids = found.groups()
    return _iota(*ids).reshape(int(rows), int(columns)).tolist()
  if found := re.match(rf"mesh\[([^\]]*)\](?:, device_ids=\((?:{iota}|([\d,]+))\))? \{{([^}}]*)\}}", text):
    mesh, shape, turn, listed, along = found.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    order = _iota(shape, turn) if shape else np.array(listed.split(","), int) if listed else None
    order = np.arange(math.prod(sizes.values())) if order is None else order
    names = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)
    # A part of an axis makes that axis three: before, the part, after.
    split, inner = [], []
    for name, size in sizes.items():
      part = next(((int(b), int(s)) for n, b, s in names if n == name and b), None)
      before, inside = part or (1, size if any(n == name for n, _, _ in names) else 1)
      split += [before, inside, size // before // inside]
      inner.append(len(split) - 2)
    order = np.moveaxis(order.reshape(split), inner, range(-len(inner), 0))
    return order.reshape(-1, math.prod(order.shape[-len(inner) :])).tolist()
  raise ValueError(f"unknown form of groups of devices: {text[:160]}")


def _iota(shape, turn):
  """Device ids written as "[8,4]T(1,0)"."""
  sizes = [int(n) for n in shape.split(",")]
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return (ids.transpose([int(n) for n in turn.split(",")]) if turn else ids).reshape(-1)


def _axes(groups, mesh) -> tuple[str, ...]:
  sizes = list(mesh.shape.values())
  differ = set()
  for group in groups:
    places = np.array(np.unravel_index(group, sizes))
    differ |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
  return tuple(name for i, name in enumerate(mesh.axis_names) if i in differ)


# ---------------------------------------------------------------- where lines come from


def _frames(text) -> dict[int, list[str]]:
  """Of each stack frame the files from it outwards."""
  tables: dict[str, dict[int, str]] = {}
  table = None
  for line in itertools.takewhile(lambda line: not line.startswith(("%", "ENTRY")), text.splitlines()):
    if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
      table = tables.setdefault(line, {})
    elif table is not None and (row := re.match(r"^(\d+) (.*)$", line)):
      table[int(row.group(1))] = row.group(2)
  number = lambda name, row: int(re.search(rf"{name}=(\d+)", row).group(1))  # noqa: E731
  names = {key: value.strip('"') for key, value in tables.get("FileNames", {}).items()}
  places = {key: names[number("file_name_id", row)] for key, row in tables.get("FileLocations", {}).items()}
  frames: dict[int, list[str]] = {}
  for key, row in sorted(tables.get("StackFrames", {}).items()):
    frames[key] = [places[number("file_location_id", row)], *frames.get(number("parent_frame_id", row) - 1, [])]
  return frames
