"""Fine-tuning of encoders and encoder-decoders that others have made: whole, or with adapters; resumed exactly."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHARED = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
BASES = {
  "bert": (
    "BertForMaskedLM",
    dict(vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
         max_position_embeddings=48),
  ),
  "t5": (
    "T5ForConditionalGeneration",
    dict(vocab_size=261, d_model=32, d_kv=16, d_ff=48, num_heads=2, num_layers=2, decoder_start_token_id=0),
  ),
  "bart": (
    "BartForConditionalGeneration",
    dict(vocab_size=261, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
         decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=48,
         decoder_start_token_id=2),
  ),
}  # fmt: skip
WAYS = {
  "full": {},
  "lora": {"peft.kind": "lora", "peft.rank": 4},
  "qlora": {"peft.kind": "lora", "peft.rank": 4, "model_init.quantize": "nf4", "model_init.group_size": 16},
}
# Each architecture and each way once; a job is prepared and trained three times.
JOBS = [("bert", "qlora"), ("t5", "lora"), ("bart", "full")]


@pytest.fixture
def base(tmp_path, request):
  """A Hugging Face directory of random weights with a tokenizer of bytes."""
  import tokenizers

  from jaxllm.data.tokenizers import HuggingFaceTokenizer, byte_alphabet

  stem, facts = BASES[request.param]
  torch.manual_seed(0)
  config_class = getattr(transformers, stem).config_class
  model = getattr(transformers, stem)(config_class(**SHARED | facts))
  model.save_pretrained(tmp_path / "base")
  rust = tokenizers.Tokenizer(tokenizers.models.BPE(byte_alphabet(), []))
  rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  rust.decoder = tokenizers.decoders.ByteLevel()
  rust.add_special_tokens(["<pad>", "<s>", "</s>", "<mask>"])
  HuggingFaceTokenizer(rust.to_str(), {"bos_token": "<s>", "eos_token": "</s>"}).save(tmp_path / "base")
  return tmp_path / "base"


def flags(base, folder, kind, **more):
  keys = {
    "model_init.path": base,
    "data.dir": folder / "data",
    "data.packing": "none",
    "data.heldout_fraction": 0.25,
    "training.steps": 8,
    "training.batch_size": 8,
    "training.seq_len": 32,
    "training.eval_every": 4,
    "optimizer.learning_rate": 1e-2,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "checkpoint.every": 4,
    "logging.every": 1,
    "logging.tensorboard": False,
    "mesh.data": 1,
  }
  source = {"kind": "jsonl", "path": str(folder / "rows.jsonl"), "name": "rows"}
  if "bert" in kind:
    keys |= {"data.task": "classification", "objective.name": "classification"}
    keys |= {"model.head": "sequence", "model.num_labels": 2, "data.labels": ("even", "odd")}
    rows = [{"text": ("aba", "xyx")[n % 2] * 3 + str(n), "label": ("even", "odd")[n % 2]} for n in range(60)]
  else:
    keys |= {"data.task": "pairs", "objective.name": "seq2seq", "data.target_len": 16}
    rows = [{"source": f"double {n}", "target": str(2 * n)} for n in range(60)]
  (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
  (folder / "empty.py").write_text(
    "from jaxllm.config import default_config\n\n\n"
    f"def get_config():\n  c = default_config()\n  c.data.sources = [{source!r}]\n  return c\n"
  )
  return [f"--config={folder / 'empty.py'}", *(f"--config.{name}={value}" for name, value in (keys | more).items())]


def figures(run):
  times = ("tokens_per_second", "step_time_s", "memory_gib", "mfu")
  rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
  return [{name: value for name, value in row.items() if name not in times} for row in rows]


@pytest.mark.parametrize("base, way", JOBS, indirect=["base"])
def test_it_learns_and_resumes(base, way, door, tmp_path, request):
  kind = request.node.callspec.params["base"]
  job = flags(base, tmp_path, kind, **WAYS[way])
  code, _, err = door("prepare", *job)
  assert code == 0, err
  for run, stops in (("whole", (8,)), ("parts", (4, 8))):
    for steps in stops:
      code, out, err = door("train", *job, f"--workdir={tmp_path / run}", f"--config.training.steps={steps}")
      assert code == 0, err
  whole = figures(tmp_path / "whole")
  assert figures(tmp_path / "parts") == whole
  curve = [row["loss"] for row in whole if "loss" in row]
  assert len(curve) == 8 and min(curve[-3:]) < curve[0] - 0.01
  assert [row["step"] for row in whole if "eval/accuracy" in row] == [4, 8]
  assert ("adapters" in out) == (way != "full")
  check_merged(tmp_path / "whole", base, way)


def check_merged(run, base, way):
  """The run is read as one model, whose weights are those that it began with and what was learned."""
  from jaxllm.interop.open import open_model

  before, after = open_model(base), open_model(run)
  kept = [path for path in after.tensors if path in before.tensors and not path.startswith("head/")]
  changed = {path for path in kept if not np.array_equal(after.tensors[path].read(), before.tensors[path].read())}
  assert len(kept) > 10
  if way == "full":
    assert "embedding/tokens" in changed
  else:
    assert changed and all("blocks/" in path and path.endswith("/weight") for path in changed)
