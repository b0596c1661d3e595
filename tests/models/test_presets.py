"""Presets have the published sizes; counted from the declaration, nothing is allocated."""

import contextlib
import math

import jax
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.interop.families import FAMILIES
from jaxllm.interop.huggingface import config_to_huggingface
from jaxllm.models import presets, presets_moe
from jaxllm.models.build import declare
from jaxllm.training.flops import matmul_parameters

PARAMETERS = {  # preset -> (family, parameters as in the model card's checkpoint)
  "gpt2_124m": ("gpt2", 124_439_808),
  "gpt3_small": ("gpt2", 124_439_808 + 1024 * 768),  # GPT-2's with twice the positions
  "llama2_7b": ("llama", 6_738_415_616),
  "llama3_8b": ("llama", 8_030_261_248),
  "llama_1b": ("llama", 1_235_814_400),
  "mistral_7b": ("mistral", 7_241_732_096),
  "mixtral_8x7b": ("mixtral", 46_702_792_704),
  "qwen2_0_5b": ("qwen2", 494_032_768),
  "qwen3_0_6b": ("qwen3", 596_049_920),
  "qwen3_30b_a3b": ("qwen3_moe", 30_532_122_624),
  "deepseek_v2_lite": ("deepseek_v2", 15_706_484_224),
  "deepseek_v3": ("deepseek_v3", 671_026_419_200),
  "gemma_2b": ("gemma", 2_506_172_416),
  "gemma2_2b": ("gemma2", 2_614_341_888),
  "gemma3_270m": ("gemma3_text", 268_098_176),
  "gemma3_1b": ("gemma3_text", 999_885_952),
  "phi3_mini": ("phi3", 3_821_079_552),
  "smollm2_135m": ("llama", 134_515_008),
  "smollm3_3b": ("smollm3", 3_075_098_624),
  "olmo2_1b": ("olmo2", 1_484_916_736),
  "pythia_160m": ("gpt_neox", 162_322_944),
  "bloom_560m": ("bloom", 559_214_592),
  "bert_base": ("bert", 109_514_298),
  "roberta_base": ("roberta", 124_697_433),
  "modernbert_base": ("modernbert", 149_655_232 + 768),  # the first layer's norm, which is not used
  "t5_small": ("t5", 60_506_624),
  "flan_t5_small": ("t5", 76_961_152),
  "bart_base": ("bart", 139_420_416 + 50265),  # final_logits_bias, a buffer there
}
# Of those with experts: the billions that a token meets, by the papers, and whether they count the embedding.
ACTIVE = {
  "mixtral_8x7b": (12.9, True),
  "qwen3_30b_a3b": (3.3, True),
  "deepseek_v2_lite": (2.4, False),
  "deepseek_v3": (37, True),
}


def preset(name):
  return getattr(presets_moe if name in ACTIVE else presets, name)()


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
  shapes = declare(preset(name))[1]
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name][1]


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_is_a_model_of_its_family(name):
  config_to_huggingface(preset(name), PARAMETERS[name][0])


@pytest.mark.parametrize("name", ACTIVE)
def test_parameters_that_a_token_meets(name):
  config = preset(name)
  billions, with_embedding = ACTIVE[name]
  embedding = config.vocab_size * config.embed_dim if with_embedding else 0
  assert (matmul_parameters(config) + embedding) / 1e9 == pytest.approx(billions, rel=0.025)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_family_can_say_a_model_or_says_why_not(name):
  able = []
  for family in FAMILIES:
    with contextlib.suppress(ConfigError):
      config_to_huggingface(preset(name), family)
      able.append(family)
  assert PARAMETERS[name][0] in able
