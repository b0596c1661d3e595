"""Tiny checkpoints, as Hugging Face would hold them."""

import numpy as np

from jaxllm.interop.huggingface import config_from_huggingface, to_huggingface
from jaxllm.interop.tensors import in_memory
from jaxllm.models.build import declare

VOCAB = 384
LLAMA3 = dict(
  rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
LONGROPE = dict(rope_type="longrope", short_factor=[1.0, 1.25, 1.5, 2.0], long_factor=[1.0, 2.5, 6.0, 32.0])
LONGROPE |= dict(original_max_position_embeddings=32, factor=4.0)
SMALL = dict(
  vocab_size=VOCAB,
  hidden_size=64,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
)
LATENT = dict(kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24, num_key_value_heads=4)
LATENT |= dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1)
DEEPSEEK_YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0.7)
# At which the dimensions between which YaRN blends are whole numbers, but for so little that they round to them.
OSS_THETA = 10327.635
OSS_YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=2027, truncate=False)
ENCODER = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
T5 = dict(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
GEMMA = SMALL | dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=8, hidden_activation="gelu_pytorch_tanh")
CONFIGS = {
  "llama": SMALL | dict(model_type="llama", rms_norm_eps=1e-6, rope_theta=5e5),
  "llama-tied-wide": SMALL | dict(model_type="llama", tie_word_embeddings=True, head_dim=32),
  "llama-biases": SMALL | dict(model_type="llama", attention_bias=True, mlp_bias=True, num_key_value_heads=4),
  "llama-llama3": SMALL | dict(model_type="llama", rope_scaling=LLAMA3),
  "llama-linear": SMALL | dict(model_type="llama", rope_scaling=dict(rope_type="linear", factor=2.0)),
  "mistral": SMALL | dict(model_type="mistral", sliding_window=None),
  "qwen2": SMALL | dict(model_type="qwen2", tie_word_embeddings=True),
  "qwen2-yarn": SMALL
  | dict(
    model_type="qwen2",
    rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.5),
  ),
  "qwen3": SMALL | dict(model_type="qwen3", head_dim=32),
  "olmo": SMALL | dict(model_type="olmo"),
  "olmo-clipped": SMALL | dict(model_type="olmo", clip_qkv=1.5, tie_word_embeddings=True),
  "olmo2": SMALL | dict(model_type="olmo2"),
  "smollm3": SMALL | dict(model_type="smollm3", num_hidden_layers=4),
  "gemma": SMALL | dict(model_type="gemma", head_dim=32),
  "gemma3": GEMMA | dict(model_type="gemma3_text", num_hidden_layers=7, final_logit_softcapping=20.0),
  "gemma2": GEMMA | dict(model_type="gemma2"),
  "mixtral": SMALL | dict(model_type="mixtral", num_local_experts=4, sliding_window=None),
  "qwen3-moe": SMALL
  | dict(model_type="qwen3_moe", head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
  | dict(norm_topk_prob=True, mlp_only_layers=[], decoder_sparse_step=1),
  "phi3": SMALL | dict(model_type="phi3", partial_rotary_factor=0.5, pad_token_id=None, sliding_window=None),
  "phi3-longrope": SMALL
  | dict(model_type="phi3", partial_rotary_factor=0.5, pad_token_id=None, sliding_window=None)
  | dict(rope_scaling=LONGROPE, original_max_position_embeddings=32),
  "llama-longrope": SMALL | dict(model_type="llama", head_dim=8, rope_scaling=LONGROPE),
  "starcoder2": SMALL | dict(model_type="starcoder2", use_bias=True, sliding_window=None),
  "gpt-neox": SMALL | dict(model_type="gpt_neox", rotary_pct=0.25, hidden_act="gelu_new"),
  "gpt-neox-rotated": SMALL | dict(model_type="gpt_neox", rotary_pct=1.0, rotary_emb_base=5000, hidden_act="gelu_new"),
  "gpt-neox-serial": SMALL | dict(model_type="gpt_neox", use_parallel_residual=False, hidden_act="gelu_new"),
  "bloom": dict(model_type="bloom", vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, seq_length=128),
  "granite": SMALL
  | dict(model_type="granite", embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0)
  | dict(attention_multiplier=0.1),
  "cohere": SMALL | dict(model_type="cohere", logit_scale=0.5, tie_word_embeddings=True),
  "cohere-normed": SMALL
  | dict(model_type="cohere", logit_scale=0.5, tie_word_embeddings=True, use_qk_norm=True, num_hidden_layers=64),
  "cohere2": SMALL
  | dict(model_type="cohere2", logit_scale=0.5, tie_word_embeddings=True, num_hidden_layers=4, sliding_window=8),
  "glm4": SMALL | dict(model_type="glm4", head_dim=32, partial_rotary_factor=0.5, pad_token_id=None),
  "olmo3": SMALL | dict(model_type="olmo3", num_hidden_layers=4, sliding_window=8),
  "glm": SMALL | dict(model_type="glm", head_dim=16, partial_rotary_factor=0.5, pad_token_id=None, attention_bias=True),
  "deepseek-v2": SMALL
  | LATENT
  | dict(model_type="deepseek_v2", q_lora_rank=None, n_shared_experts=2, topk_method="greedy", rms_norm_eps=1e-6)
  | dict(routed_scaling_factor=1.0, rope_scaling=DEEPSEEK_YARN, num_hidden_layers=27),
  "deepseek-v3": SMALL
  | LATENT
  | dict(model_type="deepseek_v3", q_lora_rank=48, n_shared_experts=1, n_group=4, topk_group=2, rms_norm_eps=1e-6)
  | dict(routed_scaling_factor=2.5, num_hidden_layers=3),
  "falcon-7b": SMALL | dict(model_type="falcon", ffn_hidden_size=256, activation="gelu_pytorch_tanh"),
  "falcon-40b": SMALL
  | dict(model_type="falcon", new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=256, activation="gelu"),
  "falcon2-11b": SMALL
  | dict(model_type="falcon", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
  "gpt-oss": SMALL
  | dict(model_type="gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
  | dict(num_hidden_layers=4, rope_theta=OSS_THETA, rope_scaling=OSS_YARN, tie_word_embeddings=False),
  "gpt2": dict(model_type="gpt2", vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=128),
}
# With a vision tower, of which nothing is read.
SEEING = {"gemma3-seeing": dict(model_type="gemma3", text_config=CONFIGS["gemma3"])}
# These have no text to continue; llama.cpp gives the states of their tokens.
ENCODERS = {
  "bert": ENCODER | dict(model_type="bert", max_position_embeddings=128),
  "bert-bare": ENCODER | dict(model_type="bert", architectures=["BertModel"], max_position_embeddings=128),
  "roberta": ENCODER | dict(model_type="roberta", max_position_embeddings=130, type_vocab_size=1),
  "camembert": ENCODER | dict(model_type="camembert", max_position_embeddings=130, type_vocab_size=1),
  "data2vec-text": ENCODER | dict(model_type="data2vec-text", max_position_embeddings=130, type_vocab_size=1),
  "xlm-roberta": ENCODER
  | dict(model_type="xlm-roberta", max_position_embeddings=130, type_vocab_size=1, architectures=["XLMRobertaModel"]),
  "electra": ENCODER | dict(model_type="electra", embedding_size=64, max_position_embeddings=128),
  "distilbert": dict(model_type="distilbert", vocab_size=VOCAB, dim=64, hidden_dim=96, n_layers=2, n_heads=4)
  | dict(max_position_embeddings=128),
  "modernbert": ENCODER
  | dict(model_type="modernbert", max_position_embeddings=128, local_attention=16)
  | dict(num_hidden_layers=4, global_rope_theta=160000.0, local_rope_theta=10000.0),
}
# A text's labels, or how well it answers another.
RANKERS = {
  "bert-classifier": ENCODER
  | dict(model_type="bert", architectures=["BertForSequenceClassification"], max_position_embeddings=128)
  | dict(id2label={"0": "bad", "1": "fair", "2": "good"}),
  "bge-reranker": ENCODER
  | dict(model_type="xlm-roberta", architectures=["XLMRobertaForSequenceClassification"], type_vocab_size=1)
  | dict(max_position_embeddings=130, id2label={"0": "LABEL_0"}),
}
ENCODER_DECODERS = {
  "t5": T5 | dict(model_type="t5"),
  "flan-t5": T5 | dict(model_type="t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
  "mt5": T5 | dict(model_type="mt5", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
ALL = CONFIGS | ENCODERS | RANKERS | ENCODER_DECODERS

TEXT = """def add(first, second):
  \"\"\"Adds two numbers; 12 and 345 make 357.\"\"\"
  return first + second

The quick brown fox jumps over the lazy dog. Größe, naïve, 世界, Привет.
"""


def checkpoint(name, dtype=np.float32, seed=0):
  """(config.json, tensors) with random weights; norm scales near 1."""
  hf = name if isinstance(name, dict) else (ALL | SEEING)[name]
  config = config_from_huggingface(hf)
  rng = np.random.default_rng(seed)
  params = {}
  for path, shape in _flat(declare(config)[1]).items():
    x = 0.1 * rng.standard_normal(shape.shape)
    if path.endswith("scale") and not config.norm_unit_offset:
      x += 1
    params[path] = x.astype(dtype)
  if "text_config" in hf:
    tensors = to_huggingface(config, hf["text_config"]["model_type"], in_memory(params))[1]
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    return hf, tensors | in_memory({"vision_tower.patches": np.ones(3, np.float32)})
  return to_huggingface(config, hf["model_type"], in_memory(params))


def _flat(tree, prefix=""):
  if not isinstance(tree, dict):
    return {prefix[:-1]: tree}
  return {k: v for key, child in tree.items() for k, v in _flat(child, f"{prefix}{key}/").items()}
