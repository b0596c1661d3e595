"""The Hugging Face architectures that can be read and written, by `model_type`."""

from jaxllm.interop.families.bloom import BLOOM
from jaxllm.interop.families.gemma import GEMMA2
from jaxllm.interop.families.gpt2 import GPT2
from jaxllm.interop.families.gpt_neox import GPT_NEOX
from jaxllm.interop.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from jaxllm.interop.families.olmo2 import OLMO2

FAMILIES = {family.name: family for family in (BLOOM, GEMMA2, GPT2, GPT_NEOX, LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3)}
