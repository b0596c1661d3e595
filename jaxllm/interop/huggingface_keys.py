"""What a config.json says that goes unread, and where it contradicts itself: one line each, for whoever opens it."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.base.errors import shown
from jaxllm.interop.directory_files import Generation
from jaxllm.interop.families.class_defaults import CLASS_DEFAULTS, SPELLINGS
from jaxllm.interop.families.rope import BY_KIND, rope_settings
from jaxllm.interop.huggingface import family_of, read_config

# Keys that change nothing that a model computes here, by the reason.
HARMLESS = {
  "of training, which has settings of its own here": (
    *("activation_dropout", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout"),
    *("cls_dropout", "decoder_layerdrop", "dropout", "dropout_rate", "embd_pdrop", "embedding_dropout"),
    *("encoder_layerdrop", "hidden_dropout", "hidden_dropout_prob", "layerdrop", "mlp_dropout", "pooler_dropout"),
    *("qa_dropout", "resid_pdrop", "residual_dropout", "seq_classif_dropout", "router_jitter_noise"),
    *("router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "initializer_range", "initializer_factor"),
    *("initializer_cutoff_factor", "init_std", "gradient_checkpointing", "sparse_prediction"),
    *("sparse_pred_ignore_index", "repad_logits_with_grad", "problem_type"),
  ),
  "how transformers computes the same, or what else it hands back": (
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_past", "output_router_logits"),
    *("pretraining_tp", "ep_size", "slow_but_exact", "reorder_and_upcast_attn", "deterministic_flash_attn"),
    *("reference_compile", "chunk_size_feed_forward", "attn_implementation", "_attn_implementation", "torchscript"),
    *("_attn_implementation_autoset", "attention_softmax_in_fp32", "masked_softmax_fusion", "bias_dropout_fusion"),
    *("skip_bias_add", "skip_bias_add_qkv", "offset_alibi", "use_bfloat16"),
  ),
  "about the files, not the model": (
    *("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path"),
    *("_commit_hash", "auto_map", "tokenizer_class", "finetuning_task", "quantization_config", "unsloth_fixed"),
  ),
  "of the tokenizer": (
    *("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id", "unk_token_id"),
    *("decoder_start_token_id", "image_token_index", "boi_token_index", "eoi_token_index", "unk_index"),
  ),
  "settings of generation, for which another function looks": (
    *Generation.__annotations__,
    *("early_stopping", "num_beam_groups", "diversity_penalty", "encoder_no_repeat_ngram_size"),
    *("exponential_decay_length_penalty", "remove_invalid_values", "renormalize_logits", "task_specific_params"),
    *("prefix", "suffix", "force_bos_token_to_be_generated"),
  ),
  "names of labels, and how many they are, which is read": ("id2label", "label2id", "num_labels", "_num_labels"),
  "of classes that are not read here": (
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    *("summary_last_dropout", "mm_tokens_per_image", "vision_config", "num_mtp_layers", "num_nextn_predict_layers"),
    *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
    *("pooler_size_per_head", "pooler_type", "pooler_hidden_size"),
  ),
  "said by no more than the shape: positions of GPT-2": ("n_ctx",),
  "told by the tensors": ("legacy", "sinusoidal_pos_embds"),
}
# Keys that follow from others, in the class that writes them; another value is another model in transformers.
_HEAD = {"head_dim": lambda hf: hf["qk_rope_head_dim"]}
_HEAD |= {"qk_head_dim": lambda hf: hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]}
DERIVED: dict[str, dict[str, Callable[[Mapping[str, Any]], Any]]] = {
  "cohere2": {"head_dim": lambda hf: hf["hidden_size"] // hf["num_attention_heads"]},
  "deberta-v2": {"attention_head_size": lambda hf: hf["hidden_size"] // hf["num_attention_heads"]},
  "deepseek_v2": _HEAD,
  "deepseek_v3": _HEAD,
  "gemma3_text": {"_sliding_window_pattern": lambda hf: hf["sliding_window_pattern"]},
}
_HARMLESS = {key for keys in HARMLESS.values() for key in keys}


def unread(config: Mapping[str, Any]) -> list[str]:
  """The keys of a config.json that say something and that nothing here takes up.

  Not among them: those with no value, the `HARMLESS`, and those that another one makes idle (a window that is not
  used).

  Raises:
    ConfigError: see `config_from_huggingface`.
  """
  family = family_of(config)
  hf = read_config(config)[1]
  group = config.get(family.text_config, config)
  known = hf.asked | CLASS_DEFAULTS[family.name].keys() | family.requires.keys() | _HARMLESS
  known |= SPELLINGS.get(family.name, {}).keys()
  known |= {"layer_types"} if "use_sliding_window" in known else set()
  known |= {key for key, follows in DERIVED.get(family.name, {}).items() if group.get(key) == follows(hf)}
  return sorted(key for key, value in group.items() if key not in known and value not in (None, False, {}, []))


def remarks(config: Mapping[str, Any]) -> list[str]:
  """What a reader of a config.json should be told, a line each.

  Raises:
    ConfigError: see `config_from_huggingface`.
  """
  lines = []
  if keys := unread(config):
    lines.append(f"config.json has keys that are not read here: {', '.join(map(shown, keys))}")
  hf = read_config(config)[1]
  own, added = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
  by_kind = family_of(config).name in BY_KIND
  if by_kind and added.get("type", "default") != "default" and "rope_type" not in added:
    lines.append("config.json has a rope_scaling without rope_type, so it changes nothing, as in transformers")
  if own and added and not by_kind and own != added:
    theta = rope_settings(hf).get("rope_theta", hf.get("rope_theta"))
    line = f"config.json has rope_scaling beside rope_parameters: the first counts, with a rope_theta of {theta}"
    lost = own.get("rope_theta", theta) != theta
    lines.append(line + (f" (not {own['rope_theta']}: put it into rope_scaling to keep it)" if lost else ""))
  return lines
