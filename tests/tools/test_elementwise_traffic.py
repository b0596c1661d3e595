"""Counting bytes in HLO: on a program small enough to count by hand, and on the layer as it is compiled."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import elementwise_traffic

# A gate computed where its second factor is made; a rotation of half of an array; a copy. One KiB each: f32[256].
PROGRAM = """HloModule m, is_scheduled=true

%gated (a.1: bf16[16,32], b.1: bf16[32,16], g.1: bf16[16,16]) -> bf16[16,16] {
  %a.1 = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %b.1 = bf16[32,16]{1,0} parameter(1)
  %g.1 = bf16[16,16]{1,0} parameter(2)
  %n.1 = bf16[16,32]{1,0} multiply(%a.1, %a.1), metadata={op_name="jit(f)/rms_norm/mul"}
  %d.1 = f32[16,16]{1,0} dot(%n.1, %b.1), metadata={op_name="jit(f)/dot_general"}
  %c.1 = bf16[16,16]{1,0} convert(%d.1)
  ROOT %m.1 = bf16[16,16]{1,0} multiply(%c.1, %g.1), metadata={op_name="jit(f)/swiglu/mul"}
}

%turned (x.1: f32[512]) -> f32[256] {
  %x.1 = f32[512]{0} parameter(0)
  %s.1 = f32[256]{0} slice(%x.1), slice={[0:256]}
  ROOT %r.1 = f32[256]{0} negate(%s.1), metadata={op_name="jit(f)/transpose(jvp(rope))/neg"}
}

ENTRY %main (a: bf16[16,32], b: bf16[32,16], g: bf16[16,16], x: f32[512]) -> (bf16[16,16], f32[256], f32[512]) {
  %a = bf16[16,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %g = bf16[16,16]{1,0} parameter(2)
  %x = f32[512]{0} parameter(3)
  %gate = bf16[16,16]{1,0} fusion(%a, %b, %g), kind=kOutput, calls=%gated
  %turn = f32[256]{0:T(256)S(1)} fusion(%x), kind=kLoop, calls=%turned
  %copy = f32[512]{0} copy(%x)
  ROOT %out = (bf16[16,16]{1,0}, f32[256]{0}, f32[512]{0}) tuple(%gate, %turn, %copy)
}
"""


def test_counted_by_hand():
  rows = {(row["kernel"], row["regions"]): row["bytes"] for row in elementwise_traffic.measure(PROGRAM)}
  assert rows == {
    ("gate", ("rms_norm",)): 0,  # computed from what the product reads anyway
    ("gate", ("swiglu",)): 512,  # the other factor of the gate
    ("turn", ("rope",)): 2048,
    ("copy", ("copies",)): 4096,
  }


def test_rotations_on_a_gpu_take_one_pass_each_way():
  """Written half by half their gradient took another one."""
  pytest.importorskip("jax_cuda13_plugin")
  from machine_code import compile_gpu

  compiled, _ = compile_gpu(elementwise_traffic.both, elementwise_traffic.inputs())
  rows = elementwise_traffic.summary(elementwise_traffic.measure(compiled.as_text()), backward=True)
  by_region = {row["region"]: row for row in rows}
  assert 1 <= by_region["rope"]["ratio"] < 1.1 and by_region["rope"]["kernels"] == 4
  assert by_region["residual"]["ratio"] < 1 <= by_region["swiglu"]["ratio"] < 1.3
