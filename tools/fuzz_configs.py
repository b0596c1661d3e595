"""A small config.json of every family, for `fuzz_readers`."""

from typing import Any

SMALL = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SMALL | {"num_key_value_heads": 1, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
YARN = {
  "rope_type": "yarn",
  "factor": 2.0,
  "original_max_position_embeddings": 16,
  "mscale": 1.0,
  "mscale_all_dim": 1.0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "norm_topk_prob": True}
LATENT = {"kv_lora_rank": 4, "q_lora_rank": None, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
ENCODER = SMALL | {"max_position_embeddings": 32, "id2label": {"0": "a"}}
BART = {"vocab_size": 300, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32}
SIDES = {
  f"{side}_{size}": value
  for side in ("encoder", "decoder")
  for size, value in (("ffn_dim", 12), ("attention_heads", 2))
}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
BLOOM = {"vocab_size": 300, "hidden_size": 8, "n_layer": 2, "n_head": 2}
GPT2 = {"vocab_size": 300, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": None}
KINDS = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}}
T5 = {
  "vocab_size": 300,
  "d_model": 8,
  "d_kv": 4,
  "d_ff": 12,
  "num_layers": 2,
  "num_heads": 2,
  "feed_forward_proj": "relu",
}
# Of every family
CONFIGS: dict[str, dict[str, Any]] = {
  "llama": LLAMA | {"rope_scaling": YARN | {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4}},
  "mistral": LLAMA | {"sliding_window": 4},
  "qwen2": LLAMA | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
  "qwen3": LLAMA | {"head_dim": 4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}},
  "gemma": LLAMA | {"head_dim": 4, "hidden_act": "gelu"},
  "gemma2": LLAMA | WINDOWS | {"head_dim": 4, "final_logit_softcapping": 30.0},
  "gemma3_text": LLAMA | WINDOWS | {"head_dim": 4, "rope_parameters": KINDS},
  "gemma3": {"text_config": LLAMA | WINDOWS | {"head_dim": 4}, "vision_config": {}},
  "olmo2": LLAMA,
  "phi3": LLAMA | {"partial_rotary_factor": 1.0, "sliding_window": None},
  "smollm3": LLAMA | {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
  "gpt2": GPT2 | {"activation_function": "gelu_new"},
  "gpt_neox": SMALL | {"max_position_embeddings": 32, "rotary_pct": 0.5, "rotary_emb_base": 10000},
  "bloom": BLOOM | {"layer_norm_epsilon": 1e-5},
  "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
  "qwen3_moe": LLAMA | EXPERTS | {"decoder_sparse_step": 1, "mlp_only_layers": [0]},
  "deepseek_v2": LLAMA
  | LATENT
  | ROUTED
  | {"num_experts_per_tok": 2, "moe_intermediate_size": 6, "rms_norm_eps": 1e-6}
  | {"routed_scaling_factor": 1.0, "topk_method": "group_limited_greedy", "rope_scaling": YARN},
  "deepseek_v3": LLAMA
  | LATENT
  | ROUTED
  | {"num_experts_per_tok": 2, "moe_intermediate_size": 6, "rms_norm_eps": 1e-6}
  | {"routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
  "bert": ENCODER | {"type_vocab_size": 2, "architectures": ["BertForSequenceClassification"]},
  "roberta": ENCODER | {"pad_token_id": 1, "architectures": ["RobertaForMaskedLM"]},
  "modernbert": ENCODER
  | {"local_attention": 8, "global_attn_every_n_layers": 2, "classifier_pooling": "mean"}
  | {"rope_parameters": KINDS},
  "bart": BART | SIDES | {"scale_embedding": True},
  "t5": T5 | {"num_decoder_layers": 2},
  "mt5": T5 | {"num_decoder_layers": 2, "feed_forward_proj": "gated-gelu"},
  "mbart": BART | SIDES | {"scale_embedding": True},
  "m2m_100": BART | SIDES | {"scale_embedding": True},
  "opt": SMALL | {"ffn_dim": 12, "word_embed_proj_dim": 8, "max_position_embeddings": 32},
  "starcoder2": LLAMA | {"sliding_window": 4, "norm_epsilon": 1e-5},
  "olmo3": LLAMA | WINDOWS | {"rope_scaling": YARN},
  "granite": LLAMA | {"embedding_multiplier": 3.0, "logits_scaling": 0.7, "residual_multiplier": 0.4},
  "glm": LLAMA | {"head_dim": 4, "partial_rotary_factor": 0.5},
  "glm4": LLAMA | {"head_dim": 4, "partial_rotary_factor": 0.5, "attention_bias": True},
  "falcon": {"vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
  | {"new_decoder_architecture": True, "num_kv_heads": 1, "alibi": False},
  "gptj": GPT2 | {"rotary_dim": 2},
  "cohere": LLAMA | {"logit_scale": 2.0, "use_qk_norm": True},
  "cohere2": LLAMA | WINDOWS | {"logit_scale": 2.0, "head_dim": 4},
  "gpt_oss": LLAMA
  | WINDOWS
  | {"head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 7.0, "rope_scaling": YARN},
  "olmo": LLAMA | {"clip_qkv": 8.0},
  "camembert": ENCODER | {"pad_token_id": 1, "architectures": ["CamembertForSequenceClassification"]},
  "data2vec-text": ENCODER | {"pad_token_id": 1, "architectures": ["Data2VecTextForQuestionAnswering"]},
  "xlm-roberta-xl": ENCODER | {"pad_token_id": 1, "architectures": ["XLMRobertaXLForMaskedLM"]},
  "xlm-roberta": ENCODER | {"pad_token_id": 1, "architectures": ["XLMRobertaForTokenClassification"]},
  "distilbert": {"vocab_size": 300, "dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 2}
  | {"max_position_embeddings": 32, "architectures": ["DistilBertForQuestionAnswering"]},
  "electra": ENCODER | {"embedding_size": 4, "architectures": ["ElectraForPreTraining"]},
  "mpnet": ENCODER | {"relative_attention_num_buckets": 32, "architectures": ["MPNetForMaskedLM"]},
  "deberta-v2": ENCODER
  | {"relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True}
  | {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0, "conv_kernel_size": 3}
  | {"architectures": ["DebertaV2ForMaskedLM"]},
}
