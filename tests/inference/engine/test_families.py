"""Greedy text of the engine against transformers, token for token, of every kind of model: prompts read in parts beside
rows that draw, pages too few, beginnings that are found again, NaN in all that was not written."""

import copy
import functools

import harness
import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import test_decoder_families as decoders  # noqa: E402
import test_encoder_families as encoders  # noqa: E402

LENGTHS = (1, 5, 17, 9, 14)
NEW = 9
DECODERS = ("llama", "qwen3", "gemma2", "gemma3_text", "deepseek_v3", "bloom", "mistral", "gpt2")
PAIRS = ("t5", "bart")


def prompts(vocab, lengths=LENGTHS):
  rng = np.random.default_rng(5)
  return [rng.integers(3, vocab, length).tolist() for length in lengths]


@functools.cache
def case(name):
  """(ModelConfig, params, a function from prompt to transformers' greedy tokens)."""
  if name in PAIRS:
    model, _, config, params = encoders.case(name)
  else:
    model, hf, tensors, config, params = decoders.case(name)
  if name == "bloom":  # the norm after its embedding makes it repeat the last token, whatever came before
    model, first = copy.deepcopy(model), "word_embeddings_layernorm."
    with torch.no_grad():
      for weight in model.transformer.word_embeddings_layernorm.parameters():
        weight.mul_(0.1)
    tensors = {key: x * 0.1 if first in key else x for key, x in tensors.items()}
    config, params = decoders.params_from_huggingface(hf, tensors)

  @torch.no_grad()
  def draw(prompt):
    pair = name in PAIRS
    ids = [config.decoder_start_id] if pair else list(prompt)
    begins = len(ids)
    while len(ids) < begins + NEW:
      inputs = dict(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([ids])) if pair else {}
      logits = model(**(inputs or dict(input_ids=torch.tensor([ids])))).logits[0, -1]
      ids.append(int(logits.argmax()))
    return ids[begins:]

  return config, params, draw


@pytest.mark.parametrize("name", [*DECODERS, *PAIRS])
def test_token_for_token(name):
  config, params, draw = case(name)
  asked = prompts(config.vocab_size)
  want = [draw(prompt) for prompt in asked]
  assert len({tuple(tokens) for tokens in want}) == len(want)
  few = 4 if name in PAIRS else 9
  engine = harness.Poisoned(config, params, compute=oracle.XLA, num_pages={"global": few, "local": 6})
  assert harness.serve(engine, [harness.greedy(prompt, NEW) for prompt in asked], waits=(0, 2, 1, 1, 0)) == want
  assert engine.stats()["preemptions"] > 0
  again = [harness.greedy(asked[2], NEW)] * 2
  assert harness.serve(engine, again) == [want[2]] * 2
  assert name in PAIRS or engine.stats()["prefix_hits"] > 0
