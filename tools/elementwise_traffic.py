"""What XLA makes of a layer's norms, rotations, gates and sums: bytes moved, and kernels, beside the least.

    python tools/elementwise_traffic.py                                         # a Llama 3 8B layer on three chips
    python tools/elementwise_traffic.py --out=experiments/benchmarks/elementwise_traffic     # into .json and .md

The layer is compiled ahead of time, forward alone and with its backward pass, in bfloat16; attention itself is cut out
(its inputs are results of the layer, its output an argument), because it is a kernel of its own. In the optimized HLO
every kernel reads its arguments and writes its results once. Of a kernel that holds a matrix product, the product's
own two factors and result are taken off, so that a norm which XLA computes while it loads a factor costs nothing here,
and a gate computed before the product is stored costs what it reads beside. What remains belongs to the regions
(`jax.named_scope`) whose operations the kernel holds, in equal shares if there are several. Copies that only change a
layout are counted apart; prefetches into a TPU's vector memory are not counted, arrays that stay there are.

The least: each region reads each input and writes each output once, in bfloat16, as if every region were one kernel.

Needs what tools/machine_code.py needs, but no ptxas. Without a device XLA cannot try out its matrix products on a GPU:
which of them take an addition along may differ there.
"""

import argparse
import collections
import json
import math
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from machine_code import compile_gpu, compile_tpu

from jaxllm.kernels import elementwise
from jaxllm.parallel.topologies import GPUS

T, D, N, K, H, F = 4096, 4096, 32, 8, 128, 14336  # Llama 3 8B, one sequence
REGIONS = ("rms_norm", "rope", "swiglu", "residual")
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-start", "copy-done")
FREE += ("slice-start", "slice-done", "after-all", "partition-id", "iota", "broadcast")


# ---------------------------------------------------------------- the layer


def layer(x, attended, p, cos, sin):
  """(q, k, v, the layer's output)."""
  norm = jax.named_scope("rms_norm")(lambda x, w: elementwise.rms_norm(x, w, eps=1e-5))
  rope = jax.named_scope("rope")(elementwise.rope)
  swiglu = jax.named_scope("swiglu")(elementwise.swiglu)
  add = jax.named_scope("residual")(jnp.add)
  h = norm(x, p["norm1"])
  q, k, v = (h @ p[name] for name in "qkv")
  q, k, v = (a.reshape(1, T, -1, H) for a in (q, k, v))
  x = add(x, attended.reshape(1, T, N * H) @ p["o"])
  h = norm(x, p["norm2"])
  x = add(x, swiglu(h @ p["gate"], h @ p["up"]) @ p["down"])
  return rope(q, cos, sin), rope(k, cos, sin), v, x


def both(x, attended, p, cos, sin, cotangents):
  """The layer and its gradients, as a backward pass computes them that keeps nothing of the forward pass."""
  out, pull = jax.vjp(lambda x, attended, p: layer(x, attended, p, cos, sin), x, attended, p)
  return out, pull(cotangents)


def inputs():
  """Abstract arguments of `both`."""
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
  weights = {"norm1": (D,), "norm2": (D,), "q": (D, N * H), "k": (D, K * H), "v": (D, K * H), "o": (N * H, D)}
  weights |= {"gate": (D, F), "up": (D, F), "down": (F, D)}
  table = jax.ShapeDtypeStruct((1, T, H // 2), jnp.float32)
  x, heads = array(1, T, D), [array(1, T, n, H) for n in (N, K, K)]
  return x, heads[0], {name: array(*shape) for name, shape in weights.items()}, table, table, (*heads, x)


def least(backward: bool) -> dict[str, int]:
  """Bytes of each region; tables and vectors are left out."""
  rows, heads, inner = (2 * T * n for n in (D, (N + K) * H, F))
  forward = {"rms_norm": 4 * rows, "rope": 2 * heads, "swiglu": 3 * inner, "residual": 6 * rows}
  if not backward:
    return forward
  # Backward: norms read x and the products that make up dy (of q, k and v, of gate and up) and write dx; a gate reads
  # three and writes two; a gradient that comes from both sides of a sum is added up, twice.
  more = {"rms_norm": 9 * rows, "rope": 2 * heads, "swiglu": 5 * inner, "residual": 6 * rows}
  return {name: forward[name] + more[name] for name in REGIONS}


# ---------------------------------------------------------------- reading HLO


def _arrays(kind: str) -> list[tuple[int, int]]:
  """(numbers, bytes) of each array of a type."""
  found = re.findall(r"\b(\w+)\[([\d,]*)\]", re.sub(r"\{[^{}]*\}", "", kind))
  counts = [(math.prod(int(n) for n in dims.split(",") if n), SIZES.get(name, 4)) for name, dims in found]
  return [(count, count * size) for count, size in counts]


def _bytes(kind):
  return sum(size for _, size in _arrays(kind))


def _numbers(kind):
  return sum(count for count, _ in _arrays(kind))


class Instruction:
  """One line of HLO."""

  def __init__(self, line):
    left, right = line.split(" = ", 1)
    self.name = left.split("%")[-1].strip()
    depth, end = 0, 0
    while depth or right[end] != " ":  # the type ends at the first space outside of brackets
      depth += (right[end] in "({[") - (right[end] in ")}]")
      end += 1
    self.kind, rest = right[:end], right[end + 1 :]
    self.op = rest.split("(", 1)[0]
    inside = rest[len(self.op) + 1 :]
    arguments = re.match(r"[^()]*", inside).group(0)
    self.operands = re.findall(r"%([\w.-]+)", arguments)
    self.number = int(arguments) if self.op == "parameter" else None
    called = re.search(r"\bcalls=%([\w.-]+)", rest)
    self.calls = called.group(1) if called else None
    name = re.search(r'op_name="([^"]*)"', rest)
    parts = re.findall(r"\w+", name.group(1)) if name else []
    self.region = next((region for region in REGIONS if region in parts), None)
    self.target = (re.search(r'custom_call_target="([^"]*)"', rest) or [None, ""])[1]


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Instructions of each computation, and the entry's name."""
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if head := re.match(r"^(ENTRY )?%([\w.-]+) .*\{$", line):
      current = computations.setdefault(head.group(2), [])
      entry = head.group(2) if head.group(1) else entry
    elif current is not None and re.match(r"^\s+(ROOT )?%[\w.-]+ = ", line):
      current.append(Instruction(line))
  return computations, entry


def _inlined(computations, name, arguments, prefix=""):
  """(nodes of a computation and of all it calls: name -> (instruction, operands), the root's name)."""
  nodes, known = {}, {}
  for one in computations[name]:
    operands = [known[operand] for operand in one.operands]
    key = f"{prefix}/{one.name}"
    if one.op == "parameter":
      known[one.name] = arguments[one.number]
    elif one.calls and one.op in ("fusion", "call"):
      inner, known[one.name] = _inlined(computations, one.calls, operands, key)
      nodes |= inner
    else:
      nodes[key], known[one.name] = (one, operands), key
  return nodes, known[computations[name][-1].name]


def _products(nodes):
  return [key for key, (one, _) in nodes.items() if one.op in ("dot", "convolution")]


def kernel_traffic(one, kinds, computations) -> dict[tuple[str, ...], int]:
  """Bytes that a kernel moves beside its matrix products, by the regions that they belong to."""
  reads = {operand: _bytes(kinds[operand]) for operand in set(one.operands)}
  if not one.calls:
    label = (one.region,) if one.region else ("copies",)
    return {label: sum(reads.values()) + _bytes(one.kind)}
  arguments = [f"argument {operand}" for operand in one.operands]
  nodes, _ = _inlined(computations, one.calls, arguments)
  # A part of an argument: no more is read of it than what is sliced.
  for operand in reads:
    uses = [node for node, operands in nodes.values() if f"argument {operand}" in operands]
    if uses and all(use.op in ("slice", "dynamic-slice") for use in uses):
      reads[operand] = min(reads[operand], sum(_bytes(use.kind) for use in uses))

  def regions(keys):
    return tuple(sorted({nodes[key][0].region for key in keys if key in nodes and nodes[key][0].region}))

  products = _products(nodes)
  if not products:
    return {regions(nodes) or ("copies",): sum(reads.values()) + _bytes(one.kind)}
  before, factors = set(), 0
  stack = list(products)
  while stack:  # what the products are computed from
    for operand in nodes[stack.pop()][1]:
      if operand not in before:
        before.add(operand)
        if operand in nodes:
          stack.append(operand)
  for product in products:
    factors += sum(2 * _numbers(nodes[key][0].kind if key in nodes else kinds[key[9:]]) for key in nodes[product][1])
  results = sum(2 * _numbers(nodes[product][0].kind) for product in products)
  loaded = sum(size for operand, size in reads.items() if f"argument {operand}" in before)
  beside = sum(size for operand, size in reads.items() if f"argument {operand}" not in before)
  after = [key for key in nodes if key not in before and key not in products]
  found = collections.Counter()
  found[regions(before) or ("products",)] += loaded - factors
  found[regions(after) or ("products",)] += beside + _bytes(one.kind) - results
  return found


def measure(text: str) -> list[dict]:
  """Of each kernel that is not a bare matrix product: name, regions, bytes."""
  computations, entry = parse(text)
  kinds = {one.name: one.kind for one in computations[entry]}
  rows = []
  for one in computations[entry]:
    if one.op in FREE or one.target in ("ConcatBitcast", "AllocateBuffer") or "gemm" in one.target:
      continue
    for label, moved in kernel_traffic(one, kinds, computations).items():
      product = bool(one.calls and _products(_inlined(computations, one.calls, one.operands)[0]))
      if label != ("products",) or moved:
        rows.append({"kernel": one.name, "regions": label, "bytes": moved, "product": product})
  return rows


def summary(rows: list[dict], backward: bool) -> list[dict]:
  """By region: bytes and the least, kernels of its own and products that compute it in passing."""
  table = []
  for region in (*REGIONS, "copies", "products"):
    of = [row for row in rows if region in row["regions"]]
    moved = sum(row["bytes"] / len(row["regions"]) for row in of)
    floor = least(backward).get(region)
    table.append(
      {
        "region": region,
        "MiB": round(moved / 2**20),
        "least MiB": None if floor is None else round(floor / 2**20),
        "ratio": None if floor is None else round(moved / floor, 2),
        "kernels": len({row["kernel"] for row in of if not row["product"]}),
        "in products": len({row["kernel"] for row in of if row["product"]}),
      }
    )
  moved, floor = sum(row["bytes"] for row in rows), sum(least(backward).values())
  kernels = len({row["kernel"] for row in rows if not row["product"]})
  ratio = round(moved / floor, 2)
  total = {"region": "all", "MiB": round(moved / 2**20), "least MiB": round(floor / 2**20), "ratio": ratio}
  return [*table, total | {"kernels": kernels, "in products": None}]


def markdown(results: list[dict], facts: dict) -> str:
  """The tables as people read them."""
  columns = ("region", "MiB", "least MiB", "ratio", "kernels", "in products")
  lines = [
    "# Bytes that elementwise work moves in a Llama 3 8B layer\n",
    f"jax {facts['jax']}, libtpu {facts['libtpu']}, ",
  ]
  lines[-1] += f"`{facts['command']}`. What is counted: see tools/elementwise_traffic.py.\n"
  for result in results:
    lines += [f"\n## {result['chip']}, {result['pass']}\n", "| " + " | ".join(columns) + " |", "|" + "---|" * 6]
    for row in result["table"]:
      lines.append("| " + " | ".join("" if row[name] is None else str(row[name]) for name in columns) + " |")
  return "\n".join(lines) + "\n"


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--chips", default="h100,v5e,v6e")
  parser.add_argument("--kernels", action="store_true", help="also print every kernel")
  parser.add_argument("--out", default="", help="where to write the tables, without ending")
  args = parser.parse_args()
  results = []
  for chip in args.chips.split(","):
    for name, function in (("forward", layer), ("forward and backward", both)):
      arguments = inputs() if function is both else inputs()[:-1]
      compiled = compile_gpu(function, arguments, chip)[0] if chip in GPUS else compile_tpu(function, arguments, chip)
      rows = measure(compiled.as_text())
      results.append({"chip": chip, "pass": name, "table": summary(rows, function is both), "kernels": rows})
      print(f"\n{chip}, {name}")
      for row in results[-1]["table"]:
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items() if value is not None))
      for row in rows if args.kernels else ():
        print(f"    {row['bytes'] / 2**20:8.1f} MiB {'+'.join(row['regions']):20} {row['kernel']}")
      sys.stdout.flush()
  if args.out:
    import importlib.metadata

    facts = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    facts |= {"command": "python " + " ".join(sys.argv)}
    out = Path(args.out)
    out.with_suffix(".json").write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")
    page = out.with_suffix(".md")
    concluded = page.read_text().partition("\n## What follows")[1:] if page.exists() else ()  # written by hand
    page.write_text(markdown(results, facts) + "".join(concluded))


if __name__ == "__main__":
  main()
