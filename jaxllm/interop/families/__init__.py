"""The Hugging Face architectures that can be read and written, by `model_type`."""

from jaxllm.interop.families.bart import BART
from jaxllm.interop.families.bert import BERT
from jaxllm.interop.families.bloom import BLOOM
from jaxllm.interop.families.cohere import COHERE, COHERE2
from jaxllm.interop.families.deberta import DEBERTA_V2
from jaxllm.interop.families.deepseek_v2 import DEEPSEEK_V2
from jaxllm.interop.families.deepseek_v3 import DEEPSEEK_V3
from jaxllm.interop.families.distilbert import DISTILBERT
from jaxllm.interop.families.electra import ELECTRA
from jaxllm.interop.families.falcon import FALCON
from jaxllm.interop.families.gemma import GEMMA
from jaxllm.interop.families.gemma2 import GEMMA2
from jaxllm.interop.families.gemma3 import GEMMA3, GEMMA3_TEXT
from jaxllm.interop.families.glm import GLM, GLM4
from jaxllm.interop.families.gpt2 import GPT2
from jaxllm.interop.families.gpt_neox import GPT_NEOX
from jaxllm.interop.families.gpt_oss import GPT_OSS
from jaxllm.interop.families.gptj import GPTJ
from jaxllm.interop.families.granite import GRANITE
from jaxllm.interop.families.heads import with_heads
from jaxllm.interop.families.llama import LLAMA
from jaxllm.interop.families.mbart import M2M_100, MBART
from jaxllm.interop.families.mistral import MISTRAL
from jaxllm.interop.families.mixtral import MIXTRAL
from jaxllm.interop.families.modernbert import MODERNBERT
from jaxllm.interop.families.mpnet import MPNET
from jaxllm.interop.families.mt5 import MT5
from jaxllm.interop.families.olmo import OLMO
from jaxllm.interop.families.olmo2 import OLMO2
from jaxllm.interop.families.olmo3 import OLMO3
from jaxllm.interop.families.opt import OPT
from jaxllm.interop.families.phi3 import PHI3
from jaxllm.interop.families.qwen import QWEN2, QWEN3
from jaxllm.interop.families.qwen3_moe import QWEN3_MOE
from jaxllm.interop.families.roberta import CAMEMBERT, DATA2VEC_TEXT, ROBERTA, XLM_ROBERTA, XLM_ROBERTA_XL
from jaxllm.interop.families.smollm3 import SMOLLM3
from jaxllm.interop.families.starcoder2 import STARCODER2
from jaxllm.interop.families.t5 import T5

DECODERS = tuple(
  map(
    with_heads,
    (
      *(BLOOM, COHERE, COHERE2, FALCON, GEMMA, GEMMA2, GEMMA3, GEMMA3_TEXT, GLM, GLM4, GPT2, GPTJ, GPT_NEOX, GRANITE),
      *(LLAMA, MISTRAL, OLMO, OLMO2, OLMO3, OPT, PHI3, QWEN2, QWEN3, SMOLLM3, STARCODER2),
      *(DEEPSEEK_V2, DEEPSEEK_V3, GPT_OSS, MIXTRAL, QWEN3_MOE),
    ),
  )
)
ENCODERS = (
  *(BERT, CAMEMBERT, DATA2VEC_TEXT, DEBERTA_V2, DISTILBERT, ELECTRA, MODERNBERT, MPNET, ROBERTA, XLM_ROBERTA),
  XLM_ROBERTA_XL,
)
ENCODER_DECODERS = (BART, M2M_100, MBART, MT5, T5)
FAMILIES = {family.name: family for family in DECODERS + ENCODERS + ENCODER_DECODERS}
# Of models whose own code is that of another family; they are written as that.
READ_AS = {"kimi_k2": "deepseek_v3"}
