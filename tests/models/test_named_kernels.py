"""A backend that was asked for by name is used or raises, with a cache as without."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import backends
from jaxllm.models.build import declare
from jaxllm.models.caches import init_cache
from jaxllm.models.config import Compute, MLAConfig, ModelConfig
from jaxllm.training.samples import sample_text

B, T = 2, 8
SIZES = dict(vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=64, max_seq_len=32)
MODELS = {
  "heads": ModelConfig(**SIZES),
  "latent": ModelConfig(
    **SIZES | dict(num_kv_heads=4),
    mla=MLAConfig(kv_lora_rank=16, q_lora_rank=None, nope_head_dim=8, rope_head_dim=4, value_head_dim=8),
  ),
}


@pytest.fixture
def traced(monkeypatch):
  """The backends that attention was traced with, cached or not."""
  monkeypatch.setattr(backends, "_logged", {})

  def trace(config, compute):
    graph, shapes, _ = declare(config, compute)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    cache = jax.eval_shape(lambda: init_cache(config, B, 2 * T, compute.dtype))
    jax.eval_shape(lambda p, t, c: nnx.merge(graph, p)(t, cache=c), shapes, tokens, cache)
    return list(backends.chosen("attention", compute.target))

  return trace


@pytest.mark.parametrize("model", MODELS)
def test_used(model, traced):
  assert traced(MODELS[model], Compute(attention="xla")) == ["xla"]


@pytest.mark.parametrize("model", MODELS)
def test_or_raises(model, traced):
  with pytest.raises(ConfigError, match="'cudnn' cannot compute this call: "):
    traced(MODELS[model], Compute(target="a100", dtype="bfloat16", attention="cudnn"))


def test_samples_choose_for_themselves(monkeypatch):
  """The step's backend may not know a cache, and a run must not end at its first sample."""
  import jaxllm.training.samples as samples

  seen = []

  class Model:
    def __init__(self, *_, compute):
      seen.append(compute)

    def generate(self, prompts, _):
      return []

  @dataclasses.dataclass
  class Program:
    model: ModelConfig
    compute: Compute

  monkeypatch.setattr(samples, "Model", Model)
  training = samples.TrainingConfig(sample_prompts=())
  for compute, attention in (
    (Compute(target="a100", attention="cudnn"), "auto"),
    (Compute(kernels="xla", attention="cpu"), "xla"),
  ):
    sample_text(Program(MODELS["heads"], compute), None, None, training)  # type: ignore[arg-type]
    assert seen.pop().attention == attention
