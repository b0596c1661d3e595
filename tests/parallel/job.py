"""One process of a job of several, for test_hosts.py: steps of a collective, until something happens.

job.py WHAT: steps        for ever
             end          three steps, and a normal end
             idle         no collective, for ever
             error        three steps, then process 1 raises a UserError; the others go on
             bug          the same with an error that is none of the user's
             together     all learn of process 1's error at the same place
             busy         process 1 holds Python's lock in short turns for longer than the others' patience
             exit         process 1 leaves with sys.exit, code 3
             plain        three steps, then process 1 raises; without run_door
"""

import sys
import time

from jaxllm.base.errors import DataError
from jaxllm.cli import run_door
from jaxllm.parallel.hosts import join_hosts


def main(argv):
  import logging

  import jax
  import jax.numpy as jnp
  from jax.sharding import AxisType, NamedSharding, PartitionSpec

  from jaxllm.parallel.agreement import together

  what = argv[0]
  join_hosts()
  index, count = jax.process_index(), jax.process_count()
  logging.getLogger("jaxllm").info("a line of information")
  logging.getLogger("jaxllm").warning("a warning")
  mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  x = jax.make_array_from_callback((count,), sharding, lambda _: jnp.ones(1))
  step = jax.jit(lambda x: x + x.sum() * 0)
  number = 0
  while True:
    x = step(x)
    x.block_until_ready()
    number += 1
    if number == 3:
      print("stepping", flush=True)
      if what == "end":
        return 0
      if what == "together":
        with together():
          if index == 1:
            raise DataError("the disk of process 1 is full")
      if index == 1:
        if what in ("error", "plain"):
          raise DataError("the disk of process 1 is full\nand so on")
        if what == "bug":
          raise KeyError("lost")
        if what == "exit":
          sys.exit(3)
        if what == "busy":
          end = time.monotonic() + 6
          while time.monotonic() < end:
            sum(range(100_000))
          return 0
      if what == "busy":
        return 0
      while what == "idle":
        time.sleep(1)
    time.sleep(0.02)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]) if sys.argv[1] == "plain" else run_door(main))
