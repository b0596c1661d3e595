"""The torch side of bench_finetune.py: TRL's own trainers with PEFT's adapters, in Trainer's own training loop.

eager, compile: in bfloat16 with autocast, as TRL does by default. pure: everything in bfloat16, without autocast. No
gradient checkpointing, no logging; a step is timed from where Trainer has its batch to where the weights are updated.
"""

import json
import os
import sys
import tempfile
import time

settings = json.loads(sys.argv[1])
sys.path[:0] = settings["path"]

import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from common import Peaks, batches  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

if settings["method"] == "qlora":
  import bitsandbytes  # noqa: F401
torch.set_num_threads(os.cpu_count())
method, mode = settings["method"], settings["mode"]
bf16 = settings["dtype"] == "bfloat16"
peaks = Peaks()
print(json.dumps(f"torch {torch.__version__}, trl {trl.__version__}, peft {peft.__version__}"), flush=True)


def loaded():
  more = {}
  if method == "qlora":
    more["quantization_config"] = transformers.BitsAndBytesConfig(
      load_in_4bit=True,
      bnb_4bit_quant_type="nf4",
      bnb_4bit_use_double_quant=settings["double_quantize"],
      bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    more["device_map"] = "cpu"
  narrow = bf16 and method != "full"
  return transformers.AutoModelForCausalLM.from_pretrained(
    settings["model"], dtype=torch.bfloat16 if narrow else torch.float32, attn_implementation="sdpa", **more
  )


def examples():
  """The batches as TRL's collators would make them."""
  found = []
  for rows in batches(settings):
    ids = torch.tensor(rows.reshape(-1, rows.shape[-1]))
    answer = torch.zeros_like(ids)
    answer[:, settings["prompt"] :] = 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if method == "dpo":
      found.append(batch | {"completion_mask": answer})
    else:
      found.append(batch | {"labels": ids.masked_fill(answer == 0, -100)})
  return found


class Steps(transformers.TrainerCallback):
  """Waits for a number of steps, times them, answers."""

  def __init__(self, line):
    self.wanted, self.times, self.losses = int(line), [], []

  def on_step_begin(self, args, state, control, **rest):
    self.began = time.perf_counter()

  def on_step_end(self, args, state, control, **rest):
    self.losses[-1] = self.losses[-1].item()
    self.times.append(time.perf_counter() - self.began)
    if len(self.times) < self.wanted:
      return
    if not peaks.whole:
      peaks.warmed_up()
    print(json.dumps({"times": self.times, "losses": self.losses} | facts | peaks.answer()), flush=True)
    line = sys.stdin.readline()
    self.times, self.losses = [], []
    if not line:
      os._exit(0)  # in the middle of a training that nobody wants the end of
    self.wanted = int(line)


class FixedBatches:
  """A trainer's data: the batches of both sides, one after the other."""

  def get_train_dataloader(self):
    return torch.utils.data.DataLoader(examples(), batch_size=None, shuffle=False)

  def training_step(self, *args, **rest):
    loss = super().training_step(*args, **rest)
    steps.losses.append(loss)
    return loss


class SFT(FixedBatches, SFTTrainer):
  pass


class Preferences(FixedBatches, DPOTrainer):
  pass


line = sys.stdin.readline()
if not line:
  sys.exit()
steps = Steps(line)
facts = {}
words = transformers.PreTrainedTokenizerFast(
  tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a")),
  pad_token="a",
  eos_token="b",
  unk_token="a",
)
folder = tempfile.mkdtemp()
shared = dict(
  output_dir=folder,
  report_to=[],
  use_cpu=True,
  bf16=bf16 and mode != "pure",
  gradient_checkpointing=False,
  torch_compile=mode == "compile",
  max_steps=100000,
  learning_rate=settings["learning_rate"],
  lr_scheduler_type="constant",
  warmup_steps=0,
  weight_decay=0.0,
  max_grad_norm=1.0,
  optim="adamw_torch_fused",
  per_device_train_batch_size=settings["batch"],
  logging_strategy="no",
  save_strategy="no",
  disable_tqdm=True,
)
adapters = None
if method != "full":
  adapters = peft.LoraConfig(
    r=settings["rank"], lora_alpha=settings["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
  )
if method == "dpo":
  data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
  trainer = Preferences(
    loaded(), args=DPOConfig(**shared), train_dataset=data, processing_class=words, peft_config=adapters
  )
else:
  data = Dataset.from_list([{"input_ids": [0, 1], "labels": [0, 1]}] * 2)
  config = SFTConfig(**shared, packing=False)
  trainer = SFT(loaded(), args=config, train_dataset=data, processing_class=words, peft_config=adapters)
if adapters is not None:
  first = np.load(settings["adapter"])
  for name, module in trainer.model.named_modules():
    if name.endswith(".lora_A.default"):
      a = first[name.removeprefix("base_model.model.").removesuffix(".lora_A.default")]
      module.weight.data.copy_(torch.tensor(a))
  if not bf16:  # TRL puts adapters of a quantized model in bfloat16
    for parameter in trainer.model.parameters():
      parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
trained = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
facts = {"trained": sum(trained)}
trainer.add_callback(steps)
trainer.train()
