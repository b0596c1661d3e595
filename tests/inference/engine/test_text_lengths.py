"""RoPE that goes by the length of a text (LongRoPE, dynamic NTK): as transformers reads and continues it."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from harness import Poisoned, greedy, serve

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoint_arrays import params_from_huggingface  # noqa: E402

from jaxllm.inference.engine import Engine  # noqa: E402
from jaxllm.inference.engine.speculation import Speculation  # noqa: E402
from jaxllm.models.build import unstack_layers  # noqa: E402
from jaxllm.parallel.config import MeshConfig  # noqa: E402
from jaxllm.parallel.mesh import make_mesh  # noqa: E402

V, ORIGINAL = 60, 16
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None)
LONG = dict(rope_type="longrope", short_factor=[1.0, 1.1, 1.3, 1.5], long_factor=[1.0, 2.0, 5.0, 9.0])
KINDS = {
  "longrope": ("Phi3", dict(max_position_embeddings=64, original_max_position_embeddings=ORIGINAL, rope_scaling=LONG)),
  "dynamic": (
    "Llama",
    dict(max_position_embeddings=ORIGINAL, rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=1e4)),
  ),
}
PROMPTS = [[5, 9, 2], list(range(3, 17)), list(range(20, 45)), list(range(20, 44)) + [7, 7]]


@functools.cache
def models(kind):
  """(transformers' model, our config, our params) with the same random weights."""
  name, settings = KINDS[kind]
  model = oracle.torch_model(
    getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")(**SIZES | settings)
  )
  config, params = params_from_huggingface(SIZES | settings | {"model_type": name.lower()}, oracle.tensors_of(model))
  return model, config, params


def continued(kind, prompt, count):
  """What transformers says after a prompt."""
  with torch.no_grad():
    out = models(kind)[0].generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
  return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [ORIGINAL - 3, ORIGINAL + 1, 50])
def test_logits(kind, length):
  model, config, params = models(kind)
  assert config.max_seq_len == 64 and config.rope_switch == ORIGINAL
  tokens = np.random.default_rng(length).integers(1, V, (2, length))
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(oracle.forward(config)(params, tokens), want, rtol=0, atol=2e-5 * np.ptp(want))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_texts_are_read_as_if_alone(kind):
  _, config, params = models(kind)
  short, long = (np.random.default_rng(n).integers(1, V, n) for n in (9, 30))
  row = np.concatenate([long, short, [0]])[None]
  segments = jnp.asarray([[1] * 30 + [2] * 9 + [0]])
  places = jnp.asarray([[*range(30), *range(9), 0]])
  run = oracle.forward(config)
  got = run(params, row, positions=places, segment_ids=segments)[0]
  for text, at in ((long, 0), (short, 30)):
    want = run(params, text[None])[0]
    np.testing.assert_allclose(got[at : at + len(text)], want, rtol=0, atol=2e-5 * np.ptp(want))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_on_a_mesh(kind):
  _, config, params = models(kind)
  mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
  engine = Engine(config, unstack_layers(params), compute=oracle.XLA, mesh=mesh, **harness.SMALL)
  assert serve(engine, [greedy(prompt, 20) for prompt in PROMPTS]) == [continued(kind, p, 20) for p in PROMPTS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", [0, 3])
def test_greedy_texts(kind, drafts):
  """Shorter than the original context, across it, and beyond; twice, so that pages of both are shared."""
  _, config, params = models(kind)
  speculative = Speculation("ngram", drafts, 1, 2, adaptive=False) if drafts else None
  engine = Poisoned(config, unstack_layers(params), compute=oracle.XLA, speculative=speculative)
  want = [continued(kind, prompt, 20) for prompt in PROMPTS]
  for _ in range(2):
    assert serve(engine, [greedy(prompt, 20) for prompt in PROMPTS]) == want
  assert engine.stats()["prefix_hits"]
