"""Every objective's loss is the loss that transformers computes from labels, on the same random weights."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxllm.models.build import declare
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.objectives.classification import Classification
from jaxllm.objectives.heldout import heldout_metrics
from jaxllm.objectives.masked_lm import MaskedLM
from jaxllm.objectives.seq2seq import Seq2Seq

V, B, T, S = 97, 3, 12, 17
SMALL = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=32, pad_token_id=0)  # fmt: skip
T5 = dict(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
BART = dict(vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)  # fmt: skip
CASES = {
  "masked_lm": ("BertForMaskedLM", SMALL),
  "seq2seq-t5": ("T5ForConditionalGeneration", T5),
  "seq2seq-bart": ("BartForConditionalGeneration", BART),
  "classification-sequence": ("BertForSequenceClassification", SMALL | dict(num_labels=4)),
  "classification-token": ("BertForTokenClassification", SMALL | dict(num_labels=4)),
}


def padded(rng, lengths, size, low=3):
  tokens = rng.integers(low, V, (len(lengths), size))
  mask = (np.arange(size) < np.asarray(lengths)[:, None]).astype(np.int32)
  return (tokens * mask).astype(np.int32), mask


def batch_of(name):
  """(our batch, transformers' arguments): rows of unequal length and unequal numbers of labels."""
  rng = np.random.default_rng(0)
  tokens, mask = padded(rng, (T, 7, 4), T)
  batch = {"inputs": tokens, "segment_ids": mask}
  theirs = {"input_ids": tokens, "attention_mask": mask}
  if name.startswith("seq2seq"):
    source, source_mask = padded(rng, (9, S, 3), S)
    shifted = np.roll(tokens, 1, axis=1)
    shifted[:, 0] = 2 if "bart" in name else 0
    batch = {"inputs": shifted, "targets": tokens, "segment_ids": mask, "loss_weights": mask.astype(np.float32),
             "encoder_inputs": source, "encoder_segment_ids": source_mask}  # fmt: skip
    labels = np.where(mask, tokens, -100)
    return batch, {"input_ids": source, "attention_mask": source_mask, "labels": labels}
  types = np.where(np.arange(T) > 2, mask, 0).astype(np.int32)
  if name == "classification-sequence":
    batch |= {"targets": np.array([1, 3, 0], np.int32), "loss_weights": np.ones(3, np.float32), "token_types": types}
    return batch, theirs | {"labels": batch["targets"], "token_type_ids": types}
  chosen = (rng.random((B, T)) < 0.4) & (mask > 0)
  targets = rng.integers(0, V if name == "masked_lm" else 4, (B, T)).astype(np.int32)
  batch |= {"targets": targets, "loss_weights": chosen.astype(np.float32)}
  return batch, theirs | {"labels": np.where(chosen, targets, -100)}


@pytest.mark.parametrize("name", CASES)
def test_loss(name):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from checkpoint_arrays import params_from_huggingface

  stem, settings = CASES[name]
  cls = getattr(transformers, stem)
  hf_config = cls.config_class(**settings)
  hf_config.architectures = [stem]
  torch.manual_seed(0)
  oracle = cls(hf_config).eval()
  with torch.no_grad():
    for parameter in oracle.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  if oracle.get_output_embeddings() is not None:
    oracle.tie_weights()
  tensors = {key: value.numpy() for key, value in oracle.state_dict().items()}
  config, params = params_from_huggingface(hf_config.to_dict(), tensors)
  batch, theirs = batch_of(name)
  with torch.no_grad():
    expected = oracle(**{key: torch.tensor(value).long() for key, value in theirs.items()}).loss.item()

  graph = declare(config, Compute(attention="xla"))[0]
  objective = {"masked_lm": MaskedLM, "seq2seq": Seq2Seq, "classification": Classification}[name.partition("-")[0]]()
  loss = jax.jit(lambda params, batch: objective({"policy": nnx.merge(graph, params)}, batch))
  total, weight, metrics = loss(params, batch)
  assert expected > 0.5 and float(weight) == batch["loss_weights"].sum()
  assert float(total / weight) == pytest.approx(expected, abs=2e-5)
  assert float(metrics["nll"][0]) == pytest.approx(float(total))


class Fixed:
  """A model whose label logits are given."""

  config = ModelConfig()

  def __init__(self, logits):
    self._logits = logits

  def hidden(self, tokens, **_):
    return tokens, None

  def classify(self, hidden, segment_ids):
    return self._logits


def test_macro_f1_counts_the_classes_that_occur():
  guesses, targets = np.array([0, 0, 1, 1, 4, 2]), np.array([0, 1, 1, 1, 4, 2])
  weights = np.array([1, 1, 1, 1, 1, 0], np.float32)  # the last one is padding
  logits = np.eye(5, dtype=np.float32)[guesses]
  batch = {"inputs": targets, "targets": targets, "loss_weights": weights}
  total, weight, metrics = Classification(z_loss=0.1)({"policy": Fixed(logits)}, batch)
  twice_true, seen = (np.asarray(x) for x in metrics["f1"])
  # class 0: TP 1, FP 1; class 1: TP 2, FN 1; classes 2 and 3 do not occur; class 4: TP 1
  np.testing.assert_array_equal(twice_true, [2, 4, 0, 0, 2])
  np.testing.assert_array_equal(seen, [3, 5, 0, 0, 2])
  assert float(metrics["accuracy"][0] / metrics["accuracy"][1]) == pytest.approx(4 / 5)
  log_z = np.log(np.e + 4)
  right, wrong = log_z - 1, log_z
  assert float(metrics["nll"][0]) == pytest.approx(4 * right + wrong, rel=1e-6)
  assert float(total) == pytest.approx(4 * right + wrong + 0.1 * 5 * log_z**2, rel=1e-6)

  from jaxllm.training.step import _mean

  expected = np.mean([2 / 3, 4 / 5, 1])
  assert float(_mean(metrics["f1"])) == pytest.approx(expected)
  assert heldout_metrics(Classification(), lambda _: metrics, [0, 0])["eval/f1"] == pytest.approx(expected)
