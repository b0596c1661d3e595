"""The tables of machine code: what is read from listings, what survives, how parts are merged."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import machine_code
from sass import longest_loop

SASS = """
.L_x_1:
        /*0000*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_2:
        /*0020*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], R24 ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0040*/              @!P0 BRA `(.L_x_9) ;
.L_x_3:
        /*0050*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], R24 ;
        /*0060*/               @P1 BRA `(.L_x_2) ;
        /*0070*/                   BRA.U UP2, `(.L_x_1) ;
        /*0080*/                   HGMMA.64x256x16.F32 R24, gdesc[UR4], R24 ;
        /*0090*/                   EXIT ;
.L_x_9:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*00b0*/              @!P0 BRA `(.L_x_9) ;
        /*00c0*/                   BRA `(.L_x_3) ;
"""


def test_longest_loop_is_the_inner_one_with_its_waits():
  assert longest_loop(SASS) == (128, 6)  # two products; a wait, its jump, the wait behind the code, the jump back
  assert longest_loop(SASS.replace("HGMMA", "FFMA")) == (0, 0)


def test_matrix_share_of_a_schedule():
  utilization = "CAPACITY:\nMXU\n== UTILIZATION:\n" + "2 0 0 0 0 0 1 0 1 0\n" * 100
  listing = """
   0x0   :  { %s = smov 0 } /* End region 1 */
   0x1 LB: > { %1 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %3 = vmatpush.bf16.msra.mxu1 %v3 }
   0x2   : > { %2 = vmatmul.mubr.f32.gmra %v2 }
   0x3   : > { %4 = sbr.rel (%p1) target = $region2 }
   0x4   :  { %5 = vmatmul.bf16.gmra.mxu0 %v5 }
"""
  listing += "".join(f"   0x{at}   :  {{ %6 = vadd %v1 }}\n" for at in range(5, 9))
  read = machine_code._read_bundles("k", utilization, listing, "v5e")
  assert (read.bundles, read.product_bundles, read.products, read.bundles_per_product) == (100, 8, 3, 2.67)
  assert (read.matrix_unit, read.spills, read.matrix_share) == (200, 200, (6 + 4) / (6 + 5))


def test_tables_keep_what_was_not_made_again(tmp_path, monkeypatch):
  monkeypatch.setattr(machine_code, "commit", lambda: "abc")
  keys = [("h100", "op", case, side) for case in ("a", "b") for side in ("jaxllm", "peer")]
  order = {key: i for i, key in enumerate(keys)}
  out = str(tmp_path / "table")
  first = machine_code.Table(out, "h100", order | {("h100", "op", "gone", "jaxllm"): 9})
  for key in reversed([*keys, ("h100", "op", "gone", "jaxllm")]):
    first.put(key, [{"name": "kernel", "registers": 168}])
  second = machine_code.Table(out, "h100", order)
  assert second.has(keys[0]) and not second.has(("h100", "op", "gone", "jaxllm"))
  second.put(keys[2], [{"refused": "ValueError: a | b"}])
  rows = json.loads((tmp_path / "table_h100.json").read_text())["rows"]
  assert [(row["case"], row["side"]) for row in rows] == [key[2:] for key in keys]
  assert [row.get("registers") for row in rows] == [168, 168, None, 168]
  text = (tmp_path / "table_h100.md").read_text()
  assert "refused: ValueError: a / b" in text and "TPU" not in text and len(text.strip().splitlines()) == 10


def dies(connection, every):
  """Stands for `machine_code.work`: one case kills the compiler, one takes for ever."""
  import os
  import time

  while (key := connection.recv()) is not None:
    if key == "crash":
      os._exit(7)
    if key == "hang":
      time.sleep(60)
    connection.send([{"name": key}])


def test_a_dead_compiler_costs_one_row(monkeypatch):
  monkeypatch.setattr(machine_code, "work", dies)
  compiler = machine_code.Compiler((), limit_s=30)
  try:
    assert compiler("fine") == [{"name": "fine"}]
    assert compiler("crash") == [{"refused": "the compiler died with exit code 7"}]
    assert compiler("fine") == [{"name": "fine"}]
    compiler.limit_s = 0.5
    assert compiler("hang") == [{"refused": "not done after 0.5 s"}]
  finally:
    compiler.close()


@pytest.mark.parametrize("chip,family", [("h100", "mosaic_gpu"), ("v6e", "pallas_tpu")])
def test_sides_of_a_chip(chip, family):
  found = machine_code.jobs([chip], ["attention"], frozenset({"target"}), "T4096", True)
  sides = [key[3] for key in found]
  assert sides[0] == "jaxllm" and machine_code.backend_of(chip) == family
  assert ("jax splash" in sides) == (chip == "v6e")
