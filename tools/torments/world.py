"""What is tortured: a corpus, its prepared data, a run, and the run's model in each form, all tiny."""

import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

CONFIG = """
from jaxllm.config import default_config


def get_config():
  c = default_config()
  c.data.dir = {data!r}
  c.data.sources = [dict(path={corpus!r}, name="words")]
  c.data.tokenizer.vocab_size = 300
  c.data.heldout_fraction = 0.2
  c.model.vocab_size = 320
  c.model.embed_dim = 32
  c.model.num_layers = 2
  c.model.num_heads = 2
  c.model.max_seq_len = 64
  c.training.steps = 8
  c.training.batch_size = 4
  c.training.seq_len = 32
  c.training.eval_every = 4
  c.training.eval_batches = 2
  c.training.sample_tokens = 4
  c.optimizer.learning_rate = 1e-2
  c.optimizer.warmup_steps = 1
  c.checkpoint.every = 2
  c.checkpoint.keep_last = 3
  c.logging.every = 1
  c.logging.tensorboard = False
  c.mesh.data = 1
  return c
"""


class World(NamedTuple):
  root: Path
  config: Path
  corpus: Path
  data: Path
  run: Path
  model: Path
  huggingface: Path
  gguf: Path


def write_job(folder: Path, corpus: Path, extra: str = "") -> Path:
  """A config file whose data go into `folder`; `extra` are lines that set more of `c`."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "job.py"
  text = CONFIG.format(data=str(folder / "data"), corpus=str(corpus / "*.txt"))
  path.write_text(text.replace("  return c\n", f"{extra}  return c\n"))
  return path


def build(root: Path) -> World:
  """Makes all of it through the doors; takes about a minute."""
  corpus = root / "corpus"
  corpus.mkdir(parents=True)
  draw = random.Random(0)
  words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(200)]
  for i in range(40):
    (corpus / f"{i:02d}.txt").write_text(" ".join(draw.choices(words, k=400)) + "\n")
  config = write_job(root / "job", corpus)
  world = World(root, config, corpus, root / "job/data", root / "run", root / "model", root / "hf", root / "model.gguf")
  _door("prepare", f"--config={config}")
  _door("train", f"--config={config}", f"--workdir={world.run}")
  for path, form in ((world.model, "jaxllm"), (world.huggingface, "hf"), (world.gguf, "gguf")):
    _door("convert", f"--from={world.run}", f"--to={path}", f"--format={form}")
  return world


def _door(name: str, *argv: str) -> None:
  done = subprocess.run([sys.executable, "-m", f"jaxllm.{name}", *argv], capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f"{name} failed, so there is nothing to torture: {done.stderr[-2000:]}")
