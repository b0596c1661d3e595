"""A table for bench_kernels.py whose sides misbehave in every way that a kernel can."""

import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(Path(__file__).parents[2] / "tools"))
from bench_table import Target
from kernel_cases import SDS, Case
from kernel_checks import Check


def dies(x):
  os.abort()


def hangs(x):
  time.sleep(600)


def raises(x):
  raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nat all")


def wrong(x):
  return 1.1 * x


def changes(x):
  return x + 0.01 * jax.pure_callback(lambda: np.float32(time.monotonic() % 1), SDS((), jnp.float32))


def case(name, others):
  ours = lambda backend, target: changes if backend == "unsteady" else lambda x: x  # noqa: E731
  return Case(
    op="copy",
    name=name,
    inputs=(SDS((256, 256), jnp.float32),),
    ours=ours,
    others=others,
    flops=1.0,
    bytes=2 * 4 * 256 * 256,
    backends=("xla", "unsteady"),
  )


PLAIN = case("plain", {"twice": lambda x: x * 2 / 2, "wrong": wrong})


def cases(family):
  return [case("bad", {"dies": dies, "hangs": hangs, "raises": raises, "late": lambda x: x + 0}), PLAIN]


def checks(target):
  def check(name, off):
    return Check(
      "matmul",
      name,
      lambda backend, target: lambda x: x + off,
      lambda seed: ((jnp.full(3, seed, jnp.float32),),) * 2,
      lambda known: known[0],
      True,
    )

  return [check("right", 0.0), check("wrong", 1.0)]


def targets(family):
  share = lambda ms, temp, limits: ms(PLAIN, "jaxllm xla") / ms(PLAIN, "twice")  # noqa: E731
  lost = lambda ms, temp, limits: ms(PLAIN, "jaxllm nobody")  # noqa: E731
  sides = ("jaxllm xla", "twice")
  return (
    Target("met", (PLAIN,), sides, 1e9, share, at_most=True),
    Target("missed", (PLAIN,), sides, 1e9, share),
    Target("unknown", (PLAIN,), (), 1, lost),
  )
