"""The one call for all layers takes the models that it knows, and no other."""

import dataclasses

import pytest

from jaxllm.models import presets
from jaxllm.models.config import ModelConfig, RopeScaling
from jaxllm.models.few_tokens import FREE, _is_llama


@pytest.mark.parametrize("config", [ModelConfig(), presets.llama3_8b(), presets.smollm2_135m()])
def test_a_llama(config):
  assert _is_llama(config)
  assert _is_llama(dataclasses.replace(config, rope_scaling=RopeScaling("linear", 2.0), logit_scale=0.5))


@pytest.mark.parametrize(
  "change",
  [
    {"residual_scale": 0.5},
    {"qk_norm": "heads"},
    {"parallel_residual": True, "shared_norm": True},
    {"mlp": "swiglu_clamped"},
    {"position": "alibi", "alibi_scale": 0.5},
    {"position": "none"},
    {"relative_bias": "learned"},
    {"rope_fraction": 0.5},
    {"sliding_window": 8},
    {"attention_sinks": True},
  ],
  ids=str,
)
def test_another_model(change):
  assert not _is_llama(dataclasses.replace(ModelConfig(), **change))


def test_every_free_setting_is_one():
  """A setting that was renamed would be free under its old name and checked under its new one."""
  assert {field.name for field in dataclasses.fields(ModelConfig)} >= FREE
