"""A tiny corpus, prepared once, and a config file that trains on it in seconds."""

import json
import random

import pytest
from chat_tokenizer import chat_tokenizer

CONFIG = '''"""A job that takes seconds."""
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
  c.training.steps = 6
  c.training.batch_size = 4
  c.training.seq_len = 32
  c.training.sample_tokens = 8
  c.training.eval_batches = 2
  c.optimizer.learning_rate = 1e-2
  c.optimizer.warmup_steps = 1
  c.checkpoint.every = 2
  c.logging.every = 1
  c.logging.tensorboard = False
  c.mesh.data = 1
  return c


def sweep(add):
  for learning_rate in (1e-3, 1e-2):
    add(**{{"optimizer.learning_rate": learning_rate, "training.steps": 2}})
'''


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
  """Forty files of words, some of them not UTF-8."""
  folder = tmp_path_factory.mktemp("corpus")
  draw = random.Random(0)
  words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(200)]
  for i in range(40):
    (folder / f"{i:02d}.txt").write_text(" ".join(draw.choices(words, k=400)) + "\n")
  (folder / "latin1.txt").write_bytes("caf\xe9 ".encode("latin-1") * 20)
  return folder


@pytest.fixture(scope="session")
def job(corpus, tmp_path_factory):
  """The path of the config file; its data is prepared."""
  from jaxllm.cli import run_door
  from jaxllm.prepare import main

  folder = tmp_path_factory.mktemp("job")
  path = folder / "tiny.py"
  path.write_text(CONFIG.format(data=str(folder / "data"), corpus=str(corpus / "*.txt")))
  assert run_door(main, [f"--config={path}"]) == 0
  return path


@pytest.fixture
def door(capsys):
  """Runs a door in this process: door("train", "--flag", …) -> (exit code, stdout, stderr)."""
  import importlib

  from jaxllm.cli import run_door

  def door(name, *argv):
    capsys.readouterr()
    code = run_door(importlib.import_module(f"jaxllm.{name}").main, [str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err

  return door


@pytest.fixture
def chat_job(tmp_path):
  """A config file of SFT on forty questions, and flags that change it."""
  chat_tokenizer().save(tmp_path / "tokenizer")
  rows = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(40)] + [{"question": "x" * 99, "answer": "y"}]
  (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
  path = tmp_path / "sft.py"
  path.write_text(f"""
from jaxllm.config import default_config


def get_config():
  c = default_config()
  c.data.task = "chat"
  c.data.packing = "best_fit"
  c.data.dir = "{tmp_path}/data"
  columns = dict(instruction="question", output="answer")
  c.data.sources = [dict(kind="jsonl", path="{tmp_path}/qa.jsonl", format="alpaca", columns=columns)]
  c.data.tokenizer.path = "{tmp_path}/tokenizer"
  c.data.heldout_fraction = 0.2
  c.model.vocab_size = 260
  c.model.embed_dim = 32
  c.model.num_layers = 1
  c.model.num_heads = 2
  c.model.max_seq_len = 64
  c.training.steps = 6
  c.training.batch_size = 4
  c.training.seq_len = 64
  c.training.sample_tokens = 4
  c.optimizer.schedule = "constant"  # which more steps do not change
  c.optimizer.learning_rate = 1e-2
  c.optimizer.warmup_steps = 1
  c.logging.every = 1
  c.logging.tensorboard = False
  c.mesh.data = 1
  return c
""")
  return f"--config={path}"
