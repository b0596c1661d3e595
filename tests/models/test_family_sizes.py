"""The largest published models of families without a preset: as many parameters as transformers makes of their
config.json. (test_presets.py counts the others.)"""

import math

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxllm.interop.huggingface import config_from_huggingface  # noqa: E402
from jaxllm.interop.stored import param_shapes  # noqa: E402


def sizes(hidden, layers, heads, mlp, vocab, kv=None):
  found = dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=mlp)
  return found | dict(vocab_size=vocab) | ({} if kv is None else {"num_key_value_heads": kv})


ENCODER_DECODER = dict(
  d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16, decoder_attention_heads=16,
  encoder_ffn_dim=4096, decoder_ffn_dim=4096,
)  # fmt: skip
DEBERTA = dict(
  relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
  pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
)  # fmt: skip
# name -> (class, its config.json)
LARGEST = {
  "facebook/opt-66b": (
    "OPTForCausalLM",
    dict(hidden_size=9216, num_hidden_layers=64, num_attention_heads=72, ffn_dim=36864, vocab_size=50272),
  ),
  "tiiuae/falcon-180B": (
    "FalconForCausalLM",
    dict(hidden_size=14848, num_hidden_layers=80, num_attention_heads=232, num_kv_heads=8, vocab_size=65024)
    | dict(new_decoder_architecture=True),
  ),
  "tiiuae/falcon-rw-1b": (
    "FalconForCausalLM",
    dict(hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, vocab_size=50304, multi_query=False)
    | dict(alibi=True, bias=True, parallel_attn=False),
  ),
  "bigcode/starcoder2-15b": ("Starcoder2ForCausalLM", sizes(6144, 40, 48, 24576, 49152, 4)),
  "allenai/Olmo-3-32B": ("Olmo3ForCausalLM", sizes(5120, 64, 40, 27648, 100278, 8)),
  "ibm-granite/granite-3.3-8b-instruct": (
    "GraniteForCausalLM",
    sizes(4096, 40, 32, 12800, 49159, 8) | dict(tie_word_embeddings=True, residual_multiplier=0.22),
  ),
  "THUDM/glm-4-9b-chat-hf": ("GlmForCausalLM", {}),
  "THUDM/GLM-4-32B-0414": ("Glm4ForCausalLM", sizes(6144, 61, 48, 23040, 151552, 2) | dict(attention_bias=False)),
  "EleutherAI/gpt-j-6b": ("GPTJForCausalLM", {}),
  "CohereForAI/c4ai-command-r-plus": (
    "CohereForCausalLM",
    sizes(12288, 64, 96, 33792, 256000, 8) | dict(use_qk_norm=True),
  ),
  "CohereForAI/c4ai-command-a-03-2025": ("Cohere2ForCausalLM", sizes(12288, 64, 96, 36864, 256000, 8)),
  "openai/gpt-oss-120b": ("GptOssForCausalLM", {}),
  "FacebookAI/xlm-roberta-large": (
    "XLMRobertaForMaskedLM",
    sizes(1024, 24, 16, 4096, 250002) | dict(type_vocab_size=1, max_position_embeddings=514),
  ),
  "distilbert/distilbert-base-uncased": ("DistilBertForMaskedLM", {}),
  "google/electra-large-discriminator": (
    "ElectraForPreTraining",
    sizes(1024, 24, 16, 4096, 30522) | dict(embedding_size=1024),
  ),
  "google/electra-small-generator": ("ElectraForMaskedLM", {}),
  "microsoft/mpnet-base": ("MPNetForMaskedLM", dict(max_position_embeddings=514)),
  "microsoft/deberta-v3-large": ("DebertaV2ForMaskedLM", sizes(1024, 24, 16, 4096, 128100) | DEBERTA),
  "google/mt5-xxl": (
    "MT5ForConditionalGeneration",
    dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64, vocab_size=250112),
  ),
  "facebook/mbart-large-50": ("MBartForConditionalGeneration", ENCODER_DECODER | dict(vocab_size=250054)),
  "facebook/nllb-200-3.3B": (
    "M2M100ForConditionalGeneration",
    ENCODER_DECODER
    | dict(d_model=2048, encoder_layers=24, decoder_layers=24, encoder_ffn_dim=8192, decoder_ffn_dim=8192)
    | dict(vocab_size=256206),
  ),
}
# Of these the number is known from elsewhere too: model cards, papers.
KNOWN = {
  "EleutherAI/gpt-j-6b": 6_050_882_784,
  "openai/gpt-oss-120b": 116_829_156_672,
  "distilbert/distilbert-base-uncased": 66_985_530,
}


@pytest.mark.parametrize("name", LARGEST)
def test_number_of_parameters(name):
  cls, settings = LARGEST[name]
  cls = getattr(transformers, cls)
  config = cls.config_class(**settings, architectures=[cls.__name__])
  with torch.device("meta"):
    theirs = cls(config)
  want = sum(p.numel() for p in theirs.parameters())
  if hasattr(theirs, "final_logits_bias"):
    want += theirs.final_logits_bias.numel()  # a buffer there
  c = config_from_huggingface(settings | {"model_type": config.model_type, "architectures": [cls.__name__]})
  assert sum(map(math.prod, param_shapes(c).values())) == want
  assert want == KNOWN.get(name, want)
