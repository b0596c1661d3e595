"""Presets have the published sizes; counted from the declaration, nothing is allocated."""

import math

import jax
import pytest

from jaxllm.interop.huggingface import config_to_huggingface
from jaxllm.models import presets
from jaxllm.models.build import declare

PARAMETERS = {  # as in the model cards' checkpoints
  "gpt2_124m": 124_439_808,
  "gpt3_small": 124_439_808 + 1024 * 768,  # GPT-2's with twice the positions
  "llama2_7b": 6_738_415_616,
  "llama3_8b": 8_030_261_248,
  "llama_1b": 1_235_814_400,
  "mistral_7b": 7_241_732_096,
  "qwen3_0_6b": 596_049_920,
  "gemma2_2b": 2_614_341_888,
}
FAMILY = {"gpt2": "gpt2", "gpt3": "gpt2", "llama": "llama", "llama2": "llama", "llama3": "llama"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
  shapes = declare(getattr(presets, name)())[1]
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_is_a_model_of_its_family(name):
  stem = name.split("_")[0]
  config_to_huggingface(getattr(presets, name)(), FAMILY.get(stem, {"mistral": "mistral"}.get(stem, stem)))
