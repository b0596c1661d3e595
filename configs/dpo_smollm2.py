"""The model of sft_smollm2.py learns to prefer right answers to wrong ones, its own among them, with DPO over LoRA.

Run: python tools/make_tasks.py --tasks=chain_sum,gcd --count=450 --seed=2 --model=runs/sft_smollm2 --out=data/wrong
     python -m jaxllm.prepare --config=configs/dpo_smollm2.py
     python -m jaxllm.train --config=configs/dpo_smollm2.py
     python -m jaxllm.evaluate --model=runs/dpo_smollm2 --tasks=chain_sum,gcd --count=100 --seed=9 --max-tokens=24
Hardware: 2 CPU cores with AMX.
Time: 7 minutes of training there. --sweep: three seeds.
"""

from jaxllm.config import default_config


def get_config():
  c = default_config()
  c.model_init.path = "runs/sft_smollm2"
  c.peft = {"kind": "lora", "rank": 16, "alpha": 32.0}
  c.objective = {"name": "dpo", "beta": 0.1, "sft_weight": 1.0}
  c.compute.dtype = "auto"
  c.data.dir = "data/smollm2/dpo"
  c.data.task = "preference"
  c.data.packing = "none"
  c.data.sources = [
    dict(kind="jsonl", path="data/wrong/preference.jsonl", name="wrong"),
    dict(kind="jsonl", path="data/tasks/preference.jsonl", name="other"),
  ]
  c.data.heldout_fraction = 0.05

  c.training.steps = 100
  c.training.batch_size = 8
  c.training.seq_len = 160
  c.training.eval_every = 25
  c.training.replay_dir = "data/smollm2/replay"
  c.training.sample_prompts = ()
  c.optimizer.learning_rate = 5e-4
  c.optimizer.schedule = "linear"
  c.optimizer.warmup_steps = 10
  c.optimizer.weight_decay = 0.0
  c.checkpoint.every = 50
  return c


def sweep(add):
  for seed in (1, 2, 3):
    add({"training.seed": seed})
