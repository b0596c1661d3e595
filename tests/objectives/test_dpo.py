"""DPO's losses, rewards and gradients are those of TRL's trainer, on the same random weights."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jaxllm.base.errors import ConfigError
from jaxllm.inference.load import load_model
from jaxllm.models.build import declare, stack_layers
from jaxllm.models.config import Compute
from jaxllm.objectives.dpo import DPO

V, T, B = 61, 12, 4
LOSSES = {
  "sigmoid": DPO(),
  "hinge": DPO(loss_type="hinge", beta=0.5),
  "ipo": DPO(loss_type="ipo", beta=0.2),
  "robust": DPO(loss_type="robust", label_smoothing=0.2),
}


def tokens():
  """Prompts of 3 to 5 tokens, and completions of several lengths, as TRL has them: chosen rows, then rejected ones."""
  rng = np.random.default_rng(0)
  ids, completion, real = (np.zeros((2 * B, T + 1), np.int64) for _ in range(3))
  for i in range(B):
    prompt = rng.integers(1, V, 3 + i % 3)
    for row in (i, B + i):
      length = int(rng.integers(2, T - 5))
      ids[row, : len(prompt) + length] = np.concatenate([prompt, rng.integers(1, V, length)])
      completion[row, len(prompt) : len(prompt) + length] = 1
      real[row, : len(prompt) + length] = 1
  return ids, completion, real


def batch():
  ids, completion, real = tokens()

  def rows(part):
    return {
      "inputs": ids[part, :-1].astype(np.int32),
      "targets": ids[part, 1:].astype(np.int32),
      "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
      "segment_ids": real[part, :-1].astype(np.int32),
      "loss_weights": completion[part, 1:].astype(np.float32),
    }

  return {"chosen": rows(slice(B)), "rejected": rows(slice(B, None))}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A policy and a reference, as directories."""
  torch = pytest.importorskip("torch")
  from transformers import LlamaConfig, LlamaForCausalLM

  folder = tmp_path_factory.mktemp("models")
  config = LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False)  # fmt: skip
  for seed, name in enumerate(("policy", "reference")):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
      torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / name)
  return folder


@pytest.fixture(scope="module")
def trainer(models, tmp_path_factory):
  pytest.importorskip("trl")
  import torch
  from datasets import Dataset
  from tokenizers import Tokenizer
  from tokenizers.models import WordLevel
  from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
  from trl import DPOConfig, DPOTrainer

  words = {f"w{i}": i for i in range(V)}
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1", unk_token="w0"
  )
  load = lambda name: AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)  # noqa: E731
  data = Dataset.from_list([{"prompt": "w2 w3", "chosen": "w4", "rejected": "w5"}] * 2)
  arguments = DPOConfig(output_dir=str(tmp_path_factory.mktemp("out")), report_to=[], use_cpu=True, bf16=False)
  return DPOTrainer(
    load("policy"), ref_model=load("reference"), args=arguments, train_dataset=data, processing_class=tokenizer
  )


def of_trl(trainer, objective):
  import torch

  ids, completion, real = map(torch.tensor, tokens())
  trainer.loss_types, trainer.loss_weights = [objective.loss_type], [1.0]
  trainer.beta, trainer.label_smoothing = objective.beta, objective.label_smoothing
  trainer._metrics["train"].clear()
  trainer.model.zero_grad()
  trainer.model.train()
  loss = trainer._compute_loss(
    trainer.model, {"input_ids": ids, "attention_mask": real, "completion_mask": completion}, return_outputs=False
  )
  loss.backward()
  gradient = trainer.model.lm_head.weight.grad.numpy().T
  return loss.item(), gradient, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def of_ours(models, objective, rows=None):
  rows = batch() if rows is None else rows
  loaded = {name: load_model(models / name) for name in ("policy", "reference")}
  graph = declare(loaded["policy"].config, Compute())[0]
  params = {name: stack_layers(model._weights) for name, model in loaded.items()}

  def loss(policy):
    found = objective({"policy": nnx.merge(graph, policy), "reference": nnx.merge(graph, params["reference"])}, rows)
    return found.total / found.weight, found

  (value, found), gradient = jax.value_and_grad(loss, has_aux=True)(params["policy"])
  metrics = {name: float(total / weight) for name, (total, weight) in found.metrics.items()}
  return float(value), np.asarray(gradient["head"]["weight"]), metrics


@pytest.mark.parametrize("name", LOSSES)
def test_against_trl(models, trainer, name, agrees):
  loss, gradient, metrics = of_ours(models, LOSSES[name])
  want, want_gradient, want_metrics = of_trl(trainer, LOSSES[name])
  largest = np.abs(want_gradient).max()
  agrees(f"DPO, {name} (TRL)", "loss", loss, want)
  agrees(f"DPO, {name} (TRL)", "gradient over its largest number", gradient / largest, want_gradient / largest)
  for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
              "logps/rejected", "logits/chosen", "logits/rejected"):  # fmt: skip
    assert metrics[key] == pytest.approx(want_metrics[key], rel=2e-5, abs=1e-5), key


def test_empty_pairs_do_not_count(models):
  """Those that fill a last batch."""
  whole = of_ours(models, DPO())
  empty = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch())
  filled = of_ours(models, DPO(), empty)
  assert filled[0] == pytest.approx(whole[0], rel=1e-6) and filled[2] == pytest.approx(whole[2], rel=1e-5)


def test_against_closed_forms(models):
  """What TRL has no counterpart of: smoothing, scores per token, the chosen rows' own loss, no reference."""
  base = of_ours(models, DPO())[2]
  log = lambda x: np.log1p(np.exp(-x))  # noqa: E731, -log sigmoid
  ids, completion, _ = tokens()
  lengths = completion[:, 1:].sum(1)
  one = lambda **changes: of_ours(models, dataclasses.replace(DPO(), **changes))  # noqa: E731
  free = one(reference_free=True)[2]
  assert free["rewards/chosen"] == pytest.approx(0.1 * base["logps/chosen"], rel=1e-5)
  assert one(sft_weight=2.0)[0] - one()[0] == pytest.approx(2.0 * chosen_nll(models, lengths[:B]), rel=1e-4)
  same = one(label_smoothing=0.5)
  assert same[0] == pytest.approx(float(np.mean([(log(m) + log(-m)) / 2 for m in margins(models)])), rel=1e-5)
  normal = one(length_normalized=True)
  gains = pair_gains(models) / np.stack([lengths[:B], lengths[B:]], 1)
  assert normal[0] == pytest.approx(float(log(0.1 * (gains[:, 0] - gains[:, 1])).mean()), rel=1e-5)


def pair_gains(models):
  """[B, 2] log-ratios, from the models' logits."""
  ids, completion, _ = tokens()
  totals = []
  for name in ("policy", "reference"):
    logits = np.asarray(load_model(models / name)(ids[:, :-1]), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = np.take_along_axis(logp, ids[:, 1:, None], -1)[..., 0] * completion[:, 1:]
    totals.append(each.sum(1))
  gain = totals[0] - totals[1]
  return np.stack([gain[:B], gain[B:]], 1)


def margins(models):
  gains = pair_gains(models)
  return 0.1 * (gains[:, 0] - gains[:, 1])


def chosen_nll(models, lengths):
  ids, completion, _ = tokens()
  logits = np.asarray(load_model(models / "policy")(ids[:B, :-1]), np.float64)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  each = np.take_along_axis(logp, ids[:B, 1:, None], -1)[..., 0] * completion[:B, 1:]
  return float((-each.sum(1) / lengths).mean())


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(beta=0.0), "objective.beta"),
    (dict(loss_type="robust", label_smoothing=0.5), "below 0.5"),
    (dict(loss_type="hinge", label_smoothing=0.1), "label_smoothing is for"),
  ],
)
def test_mistakes(changes, message):
  with pytest.raises(ConfigError, match=message):
    DPO(**changes)
