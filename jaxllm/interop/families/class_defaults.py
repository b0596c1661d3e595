"""What the config class of each family in transformers gives to keys that config.json lacks, and how else it
spells them.

Written by tools/class_defaults.py. Only keys that the tables read; what a class computes of others stands there.
"""

from typing import Any

# fmt: off
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
  "bart": {
    "activation_function": "gelu", "bos_token_id": 0, "d_model": 1024, "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096, "decoder_layers": 12, "decoder_start_token_id": 2, "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096, "encoder_layers": 12, "init_std": 0.02, "is_decoder": False, "is_encoder_decoder": True,
    "max_position_embeddings": 1024, "pad_token_id": 1, "scale_embedding": False, "tie_word_embeddings": True,
    "vocab_size": 50265,
  },
  "bert": {
    "add_cross_attention": False, "bos_token_id": None, "hidden_act": "gelu", "hidden_size": 768,
    "initializer_range": 0.02, "intermediate_size": 3072, "is_decoder": False, "is_encoder_decoder": False,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 0, "tie_word_embeddings": True, "type_vocab_size": 2, "vocab_size": 30522,
  },
  "bloom": {
    "apply_residual_connection_post_layernorm": False, "bos_token_id": 1, "hidden_size": 64, "initializer_range": 0.02,
    "is_encoder_decoder": False, "layer_norm_epsilon": 1e-05, "n_head": 8, "n_layer": 2, "pad_token_id": None,
    "tie_word_embeddings": True, "vocab_size": 250880,
  },
  "cohere": {
    "attention_bias": False, "bos_token_id": 5, "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02,
    "intermediate_size": 22528, "is_encoder_decoder": False, "layer_norm_eps": 1e-05, "logit_scale": 0.0625,
    "max_position_embeddings": 8192, "num_attention_heads": 64, "num_hidden_layers": 40, "num_key_value_heads": None,
    "pad_token_id": 0, "rope_theta": 500000.0, "tie_word_embeddings": True, "use_qk_norm": False, "vocab_size": 256000,
  },
  "cohere2": {
    "attention_bias": False, "bos_token_id": 5, "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02,
    "intermediate_size": 22528, "is_encoder_decoder": False, "layer_norm_eps": 1e-05, "logit_scale": 0.0625,
    "max_position_embeddings": 8192, "num_attention_heads": 64, "num_hidden_layers": 40, "num_key_value_heads": None,
    "pad_token_id": 0, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": True, "vocab_size": 256000,
  },
  "deberta-v2": {
    "bos_token_id": None, "hidden_act": "gelu", "hidden_size": 1536, "initializer_range": 0.02,
    "intermediate_size": 6144, "is_encoder_decoder": False, "layer_norm_eps": 1e-07, "max_position_embeddings": 512,
    "max_relative_positions": -1, "num_attention_heads": 24, "num_hidden_layers": 24, "pad_token_id": 0,
    "pooler_hidden_act": "gelu", "pos_att_type": None, "position_biased_input": True, "relative_attention": False,
    "tie_word_embeddings": True, "type_vocab_size": 0, "vocab_size": 128100,
  },
  "deepseek_v2": {
    "attention_bias": False, "bos_token_id": 1, "first_k_dense_replace": 0, "head_dim": None, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "is_encoder_decoder": False,
    "kv_lora_rank": 512, "max_position_embeddings": 2048, "mlp_bias": False, "moe_intermediate_size": 1407,
    "n_group": None, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": None, "pad_token_id": None, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": None, "topk_method": "greedy",
    "v_head_dim": 128, "vocab_size": 102400,
  },
  "deepseek_v3": {
    "attention_bias": False, "bos_token_id": 0, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "is_encoder_decoder": False, "kv_lora_rank": 512,
    "max_position_embeddings": 4096, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "pad_token_id": None, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_interleave": True,
    "rope_theta": 10000.0, "routed_scaling_factor": 2.5, "tie_word_embeddings": False, "topk_group": 4,
    "v_head_dim": 128, "vocab_size": 129280,
  },
  "distilbert": {
    "activation": "gelu", "bos_token_id": None, "dim": 768, "hidden_dim": 3072, "initializer_range": 0.02,
    "is_encoder_decoder": False, "max_position_embeddings": 512, "n_heads": 12, "n_layers": 6, "pad_token_id": 0,
    "tie_word_embeddings": True, "vocab_size": 30522,
  },
  "electra": {
    "add_cross_attention": False, "bos_token_id": None, "embedding_size": 128, "hidden_act": "gelu", "hidden_size": 256,
    "initializer_range": 0.02, "intermediate_size": 1024, "is_decoder": False, "is_encoder_decoder": False,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_attention_heads": 4, "num_hidden_layers": 12,
    "pad_token_id": 0, "tie_word_embeddings": True, "type_vocab_size": 2, "vocab_size": 30522,
  },
  "falcon": {
    "activation": "gelu", "alibi": False, "bias": False, "bos_token_id": 11, "ffn_hidden_size": None,
    "hidden_size": 4544, "initializer_range": 0.02, "is_encoder_decoder": False, "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048, "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 71,
    "num_hidden_layers": 32, "num_kv_heads": None, "num_ln_in_parallel_attn": None, "pad_token_id": None,
    "parallel_attn": True, "rope_theta": 10000.0, "tie_word_embeddings": True, "vocab_size": 65024,
  },
  "gemma": {
    "attention_bias": False, "bos_token_id": 2, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072,
    "initializer_range": 0.02, "intermediate_size": 24576, "is_encoder_decoder": False, "max_position_embeddings": 8192,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 16, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "tie_word_embeddings": True, "use_bidirectional_attention": None,
    "vocab_size": 256000,
  },
  "gemma2": {
    "attention_bias": False, "attn_logit_softcapping": 50.0, "bos_token_id": 2, "final_logit_softcapping": 30.0,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
    "intermediate_size": 9216, "is_encoder_decoder": False, "max_position_embeddings": 8192, "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": True,
    "use_bidirectional_attention": None, "vocab_size": 256000,
  },
  "gemma3": {
    "attention_bias": False, "attn_logit_softcapping": None, "bos_token_id": 2, "final_logit_softcapping": None,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
    "intermediate_size": 9216, "is_encoder_decoder": False, "max_position_embeddings": 131072, "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "sliding_window": 4096, "tie_word_embeddings": True, "use_bidirectional_attention": False,
    "vocab_size": 262208,
  },
  "gemma3_text": {
    "attention_bias": False, "attn_logit_softcapping": None, "bos_token_id": 2, "final_logit_softcapping": None,
    "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02,
    "intermediate_size": 9216, "is_encoder_decoder": False, "max_position_embeddings": 131072, "num_attention_heads": 8,
    "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "sliding_window": 4096, "tie_word_embeddings": True, "use_bidirectional_attention": False,
    "vocab_size": 262208,
  },
  "glm": {
    "attention_bias": True, "bos_token_id": None, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 13696, "is_encoder_decoder": False,
    "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
    "pad_token_id": 151329, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 151552,
  },
  "glm4": {
    "attention_bias": True, "bos_token_id": None, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 13696, "is_encoder_decoder": False,
    "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
    "pad_token_id": 151329, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 151552,
  },
  "gpt2": {
    "activation_function": "gelu_new", "add_cross_attention": False, "bos_token_id": 50256, "initializer_range": 0.02,
    "is_encoder_decoder": False, "layer_norm_epsilon": 1e-05, "n_embd": 768, "n_head": 12, "n_inner": None,
    "n_layer": 12, "n_positions": 1024, "pad_token_id": None, "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True, "tie_word_embeddings": True, "vocab_size": 50257,
  },
  "gpt_neox": {
    "attention_bias": True, "bos_token_id": 0, "hidden_act": "gelu", "hidden_size": 6144, "initializer_range": 0.02,
    "intermediate_size": 24576, "is_decoder": False, "is_encoder_decoder": False, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "num_attention_heads": 64, "num_hidden_layers": 44, "pad_token_id": None,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50432,
  },
  "gpt_oss": {
    "attention_bias": True, "bos_token_id": None, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
    "initializer_range": 0.02, "intermediate_size": 2880, "is_encoder_decoder": False,
    "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "num_local_experts": 128, "pad_token_id": None, "rms_norm_eps": 1e-05,
    "rope_theta": 150000.0, "router_aux_loss_coef": 0.001, "sliding_window": 128, "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088,
  },
  "gptj": {
    "activation_function": "gelu_new", "bos_token_id": 50256, "initializer_range": 0.02, "is_encoder_decoder": False,
    "layer_norm_epsilon": 1e-05, "n_embd": 4096, "n_head": 16, "n_inner": None, "n_layer": 28, "n_positions": 2048,
    "pad_token_id": None, "rotary_dim": 64, "tie_word_embeddings": False, "vocab_size": 50400,
  },
  "granite": {
    "attention_bias": False, "attention_multiplier": 1.0, "bos_token_id": 1, "embedding_multiplier": 1.0,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "is_encoder_decoder": False, "logits_scaling": 1.0, "max_position_embeddings": 2048, "mlp_bias": False,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": None, "pad_token_id": None,
    "residual_multiplier": 1.0, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 32000,
  },
  "llama": {
    "attention_bias": False, "bos_token_id": 1, "head_dim": None, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 11008, "is_encoder_decoder": False, "max_position_embeddings": 2048,
    "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": None,
    "pad_token_id": None, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "vocab_size": 32000,
  },
  "m2m_100": {
    "activation_function": "relu", "bos_token_id": 0, "d_model": 1024, "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096, "decoder_layers": 12, "decoder_start_token_id": 2, "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096, "encoder_layers": 12, "init_std": 0.02, "is_encoder_decoder": True,
    "max_position_embeddings": 1024, "pad_token_id": 1, "scale_embedding": True, "tie_word_embeddings": True,
    "vocab_size": 128112,
  },
  "mbart": {
    "activation_function": "gelu", "bos_token_id": 0, "d_model": 1024, "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096, "decoder_layers": 12, "decoder_start_token_id": None, "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096, "encoder_layers": 12, "init_std": 0.02, "is_decoder": False, "is_encoder_decoder": True,
    "max_position_embeddings": 1024, "pad_token_id": 1, "scale_embedding": False, "tie_word_embeddings": True,
    "vocab_size": 50265,
  },
  "mistral": {
    "bos_token_id": 1, "head_dim": None, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "is_encoder_decoder": False, "max_position_embeddings": 131072,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pad_token_id": None,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "vocab_size": 32000,
  },
  "mixtral": {
    "bos_token_id": 1, "head_dim": None, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "is_encoder_decoder": False, "max_position_embeddings": 131072,
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "pad_token_id": None, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
  },
  "modernbert": {
    "attention_bias": False, "bos_token_id": 50281, "classifier_activation": "gelu", "classifier_bias": False,
    "classifier_pooling": "cls", "decoder_bias": True, "hidden_activation": "gelu", "hidden_size": 768,
    "initializer_range": 0.02, "intermediate_size": 1152, "is_encoder_decoder": False, "local_attention": 128,
    "max_position_embeddings": 8192, "mlp_bias": False, "norm_bias": False, "norm_eps": 1e-05,
    "num_attention_heads": 12, "num_hidden_layers": 22, "pad_token_id": 50283, "tie_word_embeddings": True,
    "vocab_size": 50368,
  },
  "mpnet": {
    "bos_token_id": 0, "hidden_act": "gelu", "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "is_encoder_decoder": False, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "relative_attention_num_buckets": 32, "tie_word_embeddings": True,
    "vocab_size": 30527,
  },
  "mt5": {
    "bos_token_id": None, "d_ff": 1024, "d_kv": 64, "d_model": 512, "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu", "is_decoder": False, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06,
    "num_decoder_layers": None, "num_heads": 6, "num_layers": 8, "pad_token_id": 0,
    "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "tie_word_embeddings": True,
    "vocab_size": 250112,
  },
  "olmo2": {
    "attention_bias": False, "bos_token_id": None, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "is_encoder_decoder": False, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": None, "pad_token_id": 1, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 50304,
  },
  "olmo3": {
    "attention_bias": False, "bos_token_id": None, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "is_encoder_decoder": False, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": None, "pad_token_id": 1, "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 50304,
  },
  "opt": {
    "_remove_final_layer_norm": False, "activation_function": "relu", "bos_token_id": 2, "do_layer_norm_before": True,
    "enable_bias": True, "ffn_dim": 3072, "hidden_size": 768, "init_std": 0.02, "is_encoder_decoder": False,
    "layer_norm_elementwise_affine": True, "max_position_embeddings": 2048, "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "tie_word_embeddings": True, "vocab_size": 50272,
    "word_embed_proj_dim": None,
  },
  "phi3": {
    "bos_token_id": 1, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192,
    "is_encoder_decoder": False, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": None, "original_max_position_embeddings": 4096, "pad_token_id": 32000, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32064,
  },
  "qwen2": {
    "bos_token_id": None, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 22016, "is_encoder_decoder": False, "max_position_embeddings": 32768, "max_window_layers": 28,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": None,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151936,
  },
  "qwen3": {
    "attention_bias": False, "bos_token_id": None, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 22016, "is_encoder_decoder": False,
    "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pad_token_id": None, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
  },
  "qwen3_moe": {
    "attention_bias": False, "bos_token_id": None, "decoder_sparse_step": 1, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "is_encoder_decoder": False, "max_position_embeddings": 32768,
    "mlp_only_layers": None, "moe_intermediate_size": 768, "norm_topk_prob": False, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 24, "num_key_value_heads": 4,
    "pad_token_id": None, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "router_aux_loss_coef": 0.001,
    "sliding_window": 4096, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
  },
  "roberta": {
    "add_cross_attention": False, "bos_token_id": 0, "hidden_act": "gelu", "hidden_size": 768,
    "initializer_range": 0.02, "intermediate_size": 3072, "is_decoder": False, "is_encoder_decoder": False,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 1, "tie_word_embeddings": True, "type_vocab_size": 2, "vocab_size": 50265,
  },
  "smollm3": {
    "attention_bias": False, "bos_token_id": 128000, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 11008, "is_encoder_decoder": False,
    "max_position_embeddings": 32768, "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": None,
    "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004,
    "rms_norm_eps": 1e-06, "rope_theta": 2000000.0, "sliding_window": None, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 128256,
  },
  "starcoder2": {
    "bos_token_id": 50256, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "initializer_range": 0.018042,
    "intermediate_size": 12288, "is_encoder_decoder": False, "max_position_embeddings": 4096, "norm_epsilon": 1e-05,
    "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2, "pad_token_id": None,
    "rope_theta": 10000.0, "sliding_window": None, "tie_word_embeddings": True, "use_bias": True, "vocab_size": 49152,
  },
  "t5": {
    "d_ff": 2048, "d_kv": 64, "d_model": 512, "feed_forward_proj": "relu", "is_decoder": False,
    "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "num_decoder_layers": None, "num_heads": 8,
    "num_layers": 6, "pad_token_id": 0, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
  },
  "xlm-roberta": {
    "add_cross_attention": False, "bos_token_id": 0, "hidden_act": "gelu", "hidden_size": 768,
    "initializer_range": 0.02, "intermediate_size": 3072, "is_decoder": False, "is_encoder_decoder": False,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 1, "tie_word_embeddings": True, "type_vocab_size": 2, "vocab_size": 30522,
  },
}
# The keys that they stand for; where config.json has both, the spelling here goes before the key.
SPELLINGS: dict[str, dict[str, str]] = {
  "bart": {
    "hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads", "num_hidden_layers": "encoder_layers",
  },
  "bloom": {
    "n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
  },
  "deepseek_v2": {
    "num_experts": "n_routed_experts",
  },
  "deepseek_v3": {
    "num_local_experts": "n_routed_experts", "num_nextn_predict_layers": "num_mtp_layers",
  },
  "distilbert": {
    "hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers",
  },
  "falcon": {
    "n_embed": "hidden_size",
  },
  "gpt2": {
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
  },
  "gpt_oss": {
    "num_experts": "num_local_experts",
  },
  "gptj": {
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
  },
  "m2m_100": {
    "hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads", "num_hidden_layers": "encoder_layers",
  },
  "mbart": {
    "hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads", "num_hidden_layers": "encoder_layers",
  },
  "mixtral": {
    "num_experts": "num_local_experts",
  },
  "mt5": {
    "head_dim": "d_kv", "hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers",
  },
  "qwen3_moe": {
    "num_local_experts": "num_experts",
  },
  "t5": {
    "head_dim": "d_kv", "hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers",
  },
}
