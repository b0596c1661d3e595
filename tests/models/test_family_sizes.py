"""Real models at their own size, by shapes alone: as many parameters as transformers makes of their config.json."""

import math

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families_table import parameters  # noqa: E402
from shrinking import REAL, class_of, completed, family_of  # noqa: E402

from jaxllm.interop.families import FAMILIES  # noqa: E402
from jaxllm.interop.huggingface import config_from_huggingface  # noqa: E402

# Of these the number is known from elsewhere too: model cards, papers.
KNOWN = {
  "meta-llama/Llama-2-7b-hf": 6_738_415_616,
  "meta-llama/Llama-2-70b-hf": 68_976_648_192,
  "meta-llama/Llama-3.1-8B": 8_030_261_248,
  "meta-llama/Llama-3.1-405B": 405_853_388_800,
  "meta-llama/Llama-3.2-1B": 1_235_814_400,
  "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
  "HuggingFaceTB/SmolLM2-135M": 134_515_008,
  "mistralai/Mistral-7B-v0.1": 7_241_732_096,
  "mistralai/Mistral-7B-v0.3": 7_248_023_552,
  "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
  "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
  "Qwen/Qwen2.5-0.5B": 494_032_768,
  "Qwen/Qwen2.5-7B": 7_615_616_512,
  "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
  "Qwen/Qwen3-32B": 32_762_123_264,
  "Qwen/Qwen3-30B-A3B": 30_532_122_624,
  "Qwen/Qwen3-235B-A22B": 235_093_634_560,
  "google/gemma-2b": 2_506_172_416,
  "google/gemma-7b": 8_537_680_896,
  "google/gemma-2-2b": 2_614_341_888,
  "google/gemma-2-9b": 9_241_705_984,
  "google/gemma-2-27b": 27_227_128_320,
  "google/gemma-3-1b-it": 999_885_952,
  "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
  "microsoft/phi-4": 14_659_507_200,
  "microsoft/Phi-4-mini-instruct": 3_836_021_760,
  "openai-community/gpt2": 124_439_808,
  "openai-community/gpt2-xl": 1_557_611_200,
  "EleutherAI/pythia-160m": 162_322_944,
  "EleutherAI/gpt-neox-20b": 20_554_567_680,
  "EleutherAI/gpt-j-6b": 6_050_882_784,
  "bigscience/bloom-560m": 559_214_592,
  "bigscience/bloom": 176_247_271_424,
  "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
  "deepseek-ai/DeepSeek-V2": 235_741_434_880,
  "openai/gpt-oss-20b": 20_914_757_184,
  "openai/gpt-oss-120b": 116_829_156_672,
  "facebook/opt-125m": 125_239_296,
  "facebook/opt-350m": 331_196_416,
  "bigcode/starcoder2-3b": 3_030_371_328,
  "bigcode/starcoder2-15b": 15_957_889_024,
  "distilbert/distilbert-base-uncased": 66_985_530,
  "google-bert/bert-base-uncased": 109_514_298,
  "google/flan-t5-xxl": 11_135_332_352,
}


def count(model, config):
  """Parameters of a transformers model, and the buffers that are parameters here."""
  shapes = {key: p.shape for key, p in model.named_parameters()}
  shapes |= {key: b.shape for key, b in model.named_buffers() if key.endswith(("logits_bias", "correction_bias"))}
  if config.get("tie_word_embeddings") is False and hasattr(
    model, "lm_head"
  ):  # T5's class ties a fresh model's in any case, but not a file's
    shapes |= {"lm_head.weight": model.lm_head.weight.shape}
  seeing = ("vision_tower.", "multi_modal_projector.")
  return sum(math.prod(shape) for key, shape in shapes.items() if not any(part in key for part in seeing))


@pytest.mark.parametrize("name", REAL)
def test_number_of_parameters(name):
  config = REAL[name]
  cls, family = class_of(config), FAMILIES[family_of(config)]
  if cls.__name__ == family.bare and config_from_huggingface(config).head == "lm":  # tied: the embedding is its head
    cls = getattr(transformers, family.architecture)
  with torch.device("meta"):
    want = count(cls(completed(config)), config)
  assert parameters(config) == want
  assert want == KNOWN.get(name, want)
