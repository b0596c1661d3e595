"""One process of a prepare: `python -m jaxllm.data.worker DIRECTORY STAGE`, started by `jaxllm.data.crew`.

It says on its output, one JSON object a line, which units it has done and what went wrong, and ends with the process
that has started it.
"""

import json
import os
import sys
import threading
from pathlib import Path

from jaxllm.base.errors import UserError
from jaxllm.data.crew import do_units
from jaxllm.data.job import open_job
from jaxllm.data.survey import number_units
from jaxllm.data.tokenizers import sentencepiece


def main(root: str, stage: str) -> int:
  """Does what of a stage nobody else does."""
  output = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what libraries print is no message
  threading.Thread(target=_end_with_parent, daemon=True).start()
  sentencepiece.THREADS = 1  # the others have the other cores

  def say(**message) -> None:
    output.write(json.dumps(message) + "\n")
    output.flush()

  try:
    job = open_job(Path(root))
    if stage != "lines":
      number_units(job)
    do_units(job, stage, lambda number: say(done=number))
  except UserError as error:
    say(error=str(error))
  except OSError as error:
    say(error=error.strerror or str(error), errno=error.errno or 5, file=str(error.filename or root))
  return 0


def _end_with_parent() -> None:
  """The pipe from it ends when it does, whatever ended it."""
  os.read(0, 1)
  os._exit(1)


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
