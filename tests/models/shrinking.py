"""Real config.json files, and the same models small enough to run: every size divided, every oddity kept."""

import json
from pathlib import Path

import transformers

from jaxllm.interop.families import FAMILIES, READ_AS

DIRECTORY = Path(__file__).parent / "real_configs"
# "organisation/model" -> its config.json, but for what has no bearing on the model: versions, dropout, quantization
REAL = {
  name: entry["config"]
  for file in ("decoders", "encoders", "encoder_decoders")
  for name, entry in json.loads((DIRECTORY / f"{file}.json").read_text()).items()
}

# What transformers' classes call the same thing. "n_embed" is no alias there: BLOOM's class reads it by itself.
LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"}
LAYERS |= {"encoder_layers", "decoder_layers"}
HEADS = {"num_attention_heads", "n_head", "n_heads", "num_heads"}
HEADS |= {"encoder_attention_heads", "decoder_attention_heads"}
KV_HEADS = {"num_key_value_heads", "num_kv_heads"}
WIDTH = {"hidden_size", "d_model", "n_embd", "n_embed", "dim"}
HEAD_DIM = {"head_dim", "d_kv", "qk_nope_head_dim", "attention_head_size"}
VOCAB = {"vocab_size"}
MLP = {"intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"}
# in proportion to the width
WIDE = MLP | {"ffn_hidden_size", "moe_intermediate_size", "embedding_size", "word_embed_proj_dim", "pooler_hidden_size"}
# in proportion to a head's width
IN_HEAD = {"qk_rope_head_dim", "v_head_dim", "rotary_dim"}
LENGTH = {"max_position_embeddings", "n_positions", "n_ctx", "seq_length"}
ORIGINAL = "original_max_position_embeddings"
EXPERTS = {"num_local_experts", "num_experts", "n_routed_experts"}
CHOSEN = {"num_experts_per_tok", "experts_per_token"}
BY_LAYER = {"layer_types", "no_rope_layers"}
EVERY = {"sliding_window_pattern", "global_attn_every_n_layers", "no_rope_layer_interval", "decoder_sparse_step"}
FRACTION = {"rotary_pct", "partial_rotary_factor"}
TEXT = 30  # tokens: longer than any window and any original length here, shorter than any length


def family_of(config):
  """The `model_type` whose code a config.json's model has."""
  return READ_AS.get(config["model_type"], config["model_type"])


def class_of(config):
  """The transformers class of a config.json; of one that names none, that with the language-modelling head."""
  return getattr(transformers, (config.get("architectures") or [FAMILIES[family_of(config)].architecture])[0])


def completed(config):
  """The config.json as its class in transformers understands it."""
  family = family_of(config)
  return transformers.CONFIG_MAPPING[family].from_dict(config | {"model_type": family})


def shrunk(config, choose):
  """A small model's config.json with the same keys and the same oddities.

  Kept are how many query heads share a key and whether the width is theirs, what part of a head is rotated, every
  pattern of layers, groups of experts, which lengths exceed which, whether a number is odd, and each key that is no
  size. Sizes that the file leaves to its class are said where they would be too large.

  Args:
    choose: (what for, options) -> one of them.
  """
  parts = {key: shrunk(config[key], choose) for key in ("text_config", "vision_config") if key in config}
  if parts:
    return _renumbered(config | parts | {"mm_tokens_per_image": 4}, parts["text_config"]["vocab_size"])
  config = _with_sizes(config)
  given = lambda keys, other=None: next((config[k] for k in config if k in keys and config[k] is not None), other)  # noqa: E731
  layers, heads, width = given(LAYERS), given(HEADS), given(WIDTH)
  kv_heads = given(KV_HEADS, heads)
  kv_heads = heads if heads % kv_heads else kv_heads
  head_dim = given(HEAD_DIM, width // heads)

  full = completed(config)  # a pattern may be its class's
  periods = [config[key] for key in EVERY if config.get(key)]
  periods += [len(_period(kinds)) for key in BY_LAYER if (kinds := getattr(full, key, None))]
  dense = min(config.get("first_k_dense_replace", 0), 2)
  few_layers = min(layers, max([2, dense + 1, *(p + 1 for p in periods if p < layers)]) + choose("more layers", (0, 1)))
  few_kv, group = _few_heads(heads, kv_heads, choose)
  rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
  fractions = [part[key] for part in (config, rope) for key in FRACTION if part.get(key)]
  fractions.append(config.get("rotary_dim", 0) / head_dim)
  small = [d for d in (8, 10, 12, 14, 16) if head_dim % d == 0 and all(d * f % 2 == 0 for f in fractions)] or [8]
  few_dim = choose("head_dim", small)
  if "kv_lora_rank" in config:  # heads are made from the latent vector, so that the width says nothing of them
    few_width = choose("width", (24, 32))
  else:
    few_heads = few_kv * group  # some classes want the width to be a multiple of them in any case
    few_width = 2 * few_heads * max(1, round(width * few_dim / (heads * head_dim) / 2))
    few_width = few_heads * few_dim if width == heads * head_dim else few_width
  length, original = given(LENGTH, 2**30), config.get(ORIGINAL) or rope.get(ORIGINAL) or 2**30
  few_original = choose("original length", (12, 16))
  few_length = 48 + (length % 64 if length % 64 < 8 else 0)  # RoBERTa's tables have 2 rows more
  few_length = few_original * length // original if length > original else few_length
  groups = config.get("n_group") or 1
  few_groups, few_chosen = min(groups, 4), min(given(CHOSEN, 1), 3)
  in_group = -(-few_chosen // few_groups) + choose("more experts", (1, 2)) + (few_groups > 1)

  def window(old):
    options = (6, 8) if old % 2 == 0 else (5, 7, 9)
    return choose("window", options) if old < length else few_length * old // length

  def one(key, old):
    if old is None or isinstance(old, bool):
      return old
    if key in LAYERS:
      return few_layers
    if key in HEADS:
      return few_kv * group
    if key in KV_HEADS:
      return few_kv if old == kv_heads else few_kv * group
    if key in WIDTH:
      return few_width
    if key in HEAD_DIM:
      return few_dim
    if key in WIDE:
      return max(4, round(old * few_width / width))
    if key in IN_HEAD:
      return old * few_dim // head_dim
    if key in ("kv_lora_rank", "q_lora_rank"):
      return 16 * old // config["kv_lora_rank"]
    if key in VOCAB:
      return 96 + old % 16
    if key in LENGTH:
      return few_length
    if key == ORIGINAL:
      return few_original if length > old else few_length
    if key in ("sliding_window", "local_attention"):
      return window(old)
    if key in EXPERTS:
      return in_group * few_groups
    if key in CHOSEN:
      return few_chosen
    if key == "topk_group":
      return min(few_groups, -(-old * few_groups // groups))
    if key == "n_group":
      return few_groups
    if key in BY_LAYER:
      return old[:few_layers]
    if key == "first_k_dense_replace":
      return dense
    if key == "max_window_layers":
      return old * few_layers // layers
    if key in ("short_factor", "long_factor"):
      pairs = int(few_dim * (fractions[0] or 1)) // 2
      return [old[i * len(old) // pairs] for i in range(pairs)]
    if key == "query_pre_attn_scalar":
      return few_dim if old == head_dim else max(1, round(old * few_width * heads / (width * few_kv * group)))
    if key == "attention_multiplier":
      return old * head_dim / few_dim
    if key == "position_buckets" or key == "relative_attention_num_buckets" and config["model_type"] != "mpnet":
      return 8
    if key == "image_size":
      return 2 * config["patch_size"]
    return {k: one(k, v) for k, v in old.items()} if key in ("rope_scaling", "rope_parameters") else old

  small = {key: one(key, value) for key, value in config.items()}
  return _renumbered(small, small.get("vocab_size"))


def _with_sizes(config):
  """With the sizes that the file leaves to its class and that do not follow from those that it says."""
  full = completed(config)
  aliases = dict(full.attribute_map) | {"n_embed": "hidden_size"}
  said = {aliases.get(key, key) for key in config} | config.keys()
  heads, width = full.num_attention_heads, full.hidden_size
  sizes = LAYERS | HEADS | WIDTH | VOCAB | MLP | KV_HEADS | (set() if "kv_lora_rank" in config else HEAD_DIM)
  follows = {key: heads for key in KV_HEADS} | {key: width // heads for key in HEAD_DIM}
  for keys, size in ((LAYERS, full.num_hidden_layers), (HEADS, heads)):
    follows |= {key: size for key in keys if said & keys}
  more = {key: x for key, x in full.to_dict().items() if key in sizes - said and isinstance(x, int)}
  return config | {key: x for key, x in more.items() if follows.get(key) != x}


def _period(layers):
  return next(layers[:p] for p in range(1, len(layers) + 1) if all(k == layers[i % p] for i, k in enumerate(layers)))


def _few_heads(heads, kv_heads, choose):
  """(key/value heads, query heads of each), as odd as before, and powers of 2 if they were."""
  like = lambda n, options: [m for m in options if m % 2 == n % 2 and (m & m - 1 == 0) == (n & n - 1 == 0)]  # noqa: E731
  few = lambda name, n, options: n if n <= 2 else choose(name, [m for m in like(n, options) if m <= n])  # noqa: E731
  if kv_heads == heads:
    return few("heads", heads, (2, 3, 4, 5, 6, 7)), 1
  return min(kv_heads, 2 if kv_heads % 2 == 0 else 3), few("group", heads // kv_heads, (2, 3, 4, 5, 6, 7))


def _renumbered(config, vocab_size):
  """With special tokens of a small vocabulary: those below 8 are themselves, the others its last."""
  special = lambda key: key.endswith(("_token_id", "_token_index"))  # noqa: E731
  lists = [x if isinstance(x, list) else [x] for key, x in config.items() if special(key)]
  ids = sorted({i for x in lists for i in x if i is not None and i >= 8})
  new = {i: vocab_size - 1 - n for n, i in enumerate(ids)}
  at = lambda x: [at(i) for i in x] if isinstance(x, list) else new.get(x, x)  # noqa: E731
  return {key: at(x) if special(key) else x for key, x in config.items()}
