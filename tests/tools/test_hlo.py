"""Reading collectives out of compiled programs: by hand, and of programs whose traffic is known."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import collectives
import hlo

# A loop of five that adds two to its counter, with a ring in it; both ends of fused and of plain asynchronous
# collectives; a branch. One device holds 1 KiB of everything: f32[256].
PROGRAM = """HloModule m, is_scheduled=true

FileNames
1 "/home/me/jaxllm/training/step.py"
2 "/home/me/jaxllm/models/stack.py"
3 "/home/me/jaxllm/models/mlp.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=1}
2 {file_name_id=2 function_name_id=1 line=1 end_line=1 column=1 end_column=1}
3 {file_name_id=3 function_name_id=1 line=1 end_line=1 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%gather_start (p.1: f32[256]) -> f32[1024] {
  %p.1 = f32[256]{0:T(256)} parameter(0)
  ROOT %ag.1 = f32[1024]{0:T(1024)} all-gather(%p.1), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%gather_done (p.2: f32[256]) -> f32[1024] {
  %p.2 = f32[256]{0:T(256)} parameter(0)
  ROOT %ag.2 = f32[1024]{0:T(1024)} all-gather(%p.2), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%all-reduce-scatter.1 (p.3: f32[256]) -> f32[64] {
  %p.3 = f32[256]{0:T(256)} parameter(0)
  %ar.3 = f32[256]{0:T(256)} all-reduce(%p.3), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %ds = f32[64]{0:T(64)} dynamic-slice(%ar.3), dynamic_slice_sizes={64}
}

%one (q.1: f32[256]) -> f32[256] {
  %q.1 = f32[256]{0} parameter(0)
  ROOT %ar.1 = f32[256]{0} all-reduce(%q.1), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}

%other (q.2: f32[256]) -> f32[256] {
  ROOT %q.2 = f32[256]{0} parameter(0)
}

%windowed_dot_general_body (r: (s32[], f32[256])) -> (s32[], f32[256]) {
  %r = (s32[], f32[256]{0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%r), index=0
  %x.2 = f32[256]{0} get-tuple-element(%r), index=1
  %c.2 = s32[] constant(1)
  %n.2 = s32[] add(%i.2, %c.2)
  %cp = (f32[256]{0}, f32[256]{0}, u32[], u32[]) collective-permute-start(%x.2), source_target_pairs={{0,1},{1,2},{7,4}}
  %cq = f32[256]{0} collective-permute-done(%cp)
  ROOT %t.2 = (s32[], f32[256]{0}) tuple(%n.2, %cq)
}

%cond.2 (r.1: (s32[], f32[256])) -> pred[] {
  %r.1 = (s32[], f32[256]{0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%r.1), index=0
  %c.3 = s32[] constant(3)
  ROOT %l.3 = pred[] compare(%i.3, %c.3), direction=LT
}

%body (s: (s32[], f32[256])) -> (s32[], f32[256]) {
  %s = (s32[], f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[256]{0} get-tuple-element(%s), index=1
  %c = s32[] constant(1)
  %n = s32[] add(%c, %i)
  %m = s32[] add(%n, %c)
  %z = s32[] constant(0)
  %w = (s32[], f32[256]{0}) tuple(%z, %x)
  %rg = (s32[], f32[256]{0}) while(%w), condition=%cond.2, body=%windowed_dot_general_body, metadata={stack_frame_id=3}
  %y = f32[256]{0} get-tuple-element(%rg), index=1
  %f.1 = f32[1024]{0} fusion(%y), kind=kCustom, calls=%gather_start, metadata={op_name="a" stack_frame_id=3}
  %f.2 = f32[1024]{0} fusion(%y), kind=kCustom, calls=%gather_done, metadata={op_name="a" stack_frame_id=3}
  ROOT %t = (s32[], f32[256]{0}) tuple(%m, %y)
}

%cond (s.1: (s32[], f32[256])) -> pred[] {
  %s.1 = (s32[], f32[256]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %c.1 = s32[] constant(9)
  ROOT %l = pred[] compare(%i.1, %c.1), direction=LT
}

ENTRY %main (x0: f32[256], k: s32[]) -> f32[256] {
  %x0 = f32[256]{0} parameter(0)
  %k = s32[] parameter(1)
  %z0 = s32[] constant(0)
  %t0 = (s32[], f32[256]{0}) tuple(%z0, %x0)
  %loop = (s32[], f32[256]{0}) while(%t0), condition=%cond, body=%body, metadata={op_name="while" stack_frame_id=2}
  %x1 = f32[256]{0} get-tuple-element(%loop), index=1
  %rs = ((f32[256]{0}), f32[64]{0}) reduce-scatter-start(%x1), replica_groups=[2,4]<=[8], to_apply=%add
  %rt = f32[64]{0} reduce-scatter-done(%rs)
  %ars = f32[64]{0} fusion(%x1), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="here" stack_frame_id=2}
  %br = f32[256]{0} conditional(%k, %x1, %x1), branch_computations={%one, %other}
  ROOT %a2a = f32[256]{0} all-to-all(%br), replica_groups={}, dimensions={0}
}
"""


def mesh(**sizes):
  devices = np.array(jax.devices()).reshape(tuple(sizes.values()))
  return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def test_counted_by_hand():
  found = {one.kind: one for one in hlo.collectives(PROGRAM, mesh(a=2, b=4))}
  got = {kind: (one.bytes, one.loops, one.times, one.axes) for kind, one in found.items()}
  assert got == {
    "collective-permute": (1024, ("layers", "ring"), 15, ("b",)),
    "all-gather": (4096, ("layers",), 5, ("b",)),
    "reduce-scatter": (1024, (), 1, ("b",)),
    "all-reduce": (1024, (), 1, ("a",)),
    "all-to-all": (1024, (), 1, ("a", "b")),
  }
  found = hlo.collectives(PROGRAM, mesh(a=2, b=4))
  assert len(found) == 6  # a fused pair is one, and a TPU's way to scatter a sum is a reduce-scatter
  assert [(one.bytes, one.file) for one in found if one.op_name == "here"] == [(1024, "models/stack.py")]
  assert hlo.Program(PROGRAM).files(hlo.Program(PROGRAM).find("body", "rg"))[0].endswith("mlp.py")


@pytest.mark.parametrize(
  "groups, axes",
  [
    ("{{0,1},{2,3},{4,5},{6,7}}", ("c",)),
    ("[4,2]<=[2,2,2]T(0,2,1)", ("b",)),
    ("[2,4]<=[8]", ("b", "c")),
    ("[2,4]<=[2,4]T(1,0)", ("a", "c")),
    ("{}", ("a", "b", "c")),
    ("mesh['x'=2,'y'=4] {'x'}", ("a",)),
    ("mesh['x'=2,'y'=4] {'y'}", ("b", "c")),
    ("mesh['x'=2,'y'=4] {'y':(1)2}", ("b",)),
    ("mesh['x'=2,'y'=4] {'y':(2)2}", ("c",)),
    ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", ("c",)),
    ("mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'x'}", ("c",)),
  ],
)
def test_axes_of_groups(groups, axes):
  line = f"  ROOT %r = f32[4]{{0}} all-reduce(%p), replica_groups={groups}, use_global_device_ids=true, to_apply=%add"
  text = "ENTRY %main (p: f32[4]) -> f32[4] {\n  %p = f32[4]{0} parameter(0)\n" + line + "\n}\n"
  (one,) = hlo.collectives(text, mesh(a=2, b=2, c=2))
  assert one.axes == axes


def test_unknown_forms_are_errors():
  with pytest.raises(ValueError, match="unknown form"):
    hlo.collectives(
      "ENTRY %m (p: f32[4]) -> f32[4] {\n  %r = f32[4] all-reduce(%p), replica_groups=new\n}\n", mesh(a=8)
    )
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.collectives("nothing", mesh(a=8))


def test_a_compiled_program():
  """A sum over rows that lie on four devices, in each of seven rounds, of a weight gathered over two."""
  on = mesh(a=4, b=2)

  def f(x, w):
    w = jax.lax.with_sharding_constraint(w, NamedSharding(on, P()))
    step = lambda c, _: (c * jax.lax.with_sharding_constraint((x * c).sum(0), NamedSharding(on, P())), None)  # noqa: E731
    return jax.lax.scan(step, w, None, length=7)[0]

  x, w = jnp.ones((8, 16)), jnp.ones(16)
  shardings = NamedSharding(on, P("a")), NamedSharding(on, P("b"))
  text = jax.jit(f, in_shardings=shardings).lower(x, w).compile().as_text()
  rows = {(row["kind"], row["times a step"], row["bytes"], *row["axes"]) for row in collectives.table(text, on)}
  assert rows == {("all-reduce", 7, 64, "a"), ("all-gather", 1, 64, "b")}


def test_pages():
  row = {
    "kind": "all-reduce",
    "array": "f32[2]",
    "bytes": 8,
    "instructions": 1,
    "times a step": 505,
    "bytes a step": 4040,
  }
  row |= {"loops": ["micro-batches", "head loss"], "axes": ["fsdp"], "from": "a.py"}
  small = row | {"bytes": 1, "times a step": 1, "bytes a step": 1, "loops": [], "kind": "all-to-all"}
  side = {"rows": [row, small], "temporaries": 1000}
  case = {"name": "n", "config": "c", "topology": "t", "changes": ["mesh.fsdp=2"], "before": side, "after": side}
  text = collectives.page({"command": "x", "jax": "1", "cases": [case]})
  assert "| in head loss | 4.04 kB | 4.04 kB |" in text and "| the rest | | | 1 | 1 | 1 B |" in text
  assert collectives.totals([row, small]) == {"head loss": 4040, "no loop": 1}
