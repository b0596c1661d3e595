"""A checkpoint that does not fit says which tensor or setting is wrong."""

import dataclasses
import math

import jax
import numpy as np
import oracle
import pytest
from checkpoint_arrays import params_from_huggingface, params_to_huggingface

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.families import DECODERS, FAMILIES
from jaxllm.interop.huggingface import config_from_huggingface, config_to_huggingface
from jaxllm.interop.stored import param_shapes
from jaxllm.models.config import ModelConfig, MoEConfig, RopeScaling

SMALL = ModelConfig(vocab_size=11, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=24, max_seq_len=32)
GPT2 = dataclasses.replace(
  SMALL, num_kv_heads=4, position="learned", norm="layernorm", mlp="gelu_tanh",
  attention_bias=True, attention_out_bias=True, mlp_bias=True,
)  # fmt: skip


@pytest.fixture
def checkpoint():
  return params_to_huggingface(SMALL, "llama", oracle.random_params(SMALL))


def test_missing_tensor(checkpoint):
  hf, tensors = checkpoint
  del tensors["model.layers.1.mlp.up_proj.weight"]
  with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
    params_from_huggingface(hf, tensors)


def test_a_class_that_is_not_read_is_named(checkpoint):
  hf, tensors = checkpoint
  hf["architectures"] = ["LlamaForRewardModel"]
  with pytest.raises(CheckpointError, match="v_head.weight.*'LlamaForRewardModel', which is not read"):
    params_from_huggingface(hf, tensors | {"v_head.weight": np.zeros((1, 16), np.float32)})


def test_wrong_shape(checkpoint):
  hf, tensors = checkpoint
  tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((16, 16), np.float32)
  with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj\.weight has shape \(16, 16\).* \(8, 16\)"):
    params_from_huggingface(hf, tensors)


def test_unexpected_tensor(checkpoint):
  hf, tensors = checkpoint
  tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
  with pytest.raises(CheckpointError, match=r"has the tensor model\.layers\.0\.self_attn\.q_proj\.bias"):
    params_from_huggingface(hf, tensors)


def test_layers_beyond_the_config_stand_aside(checkpoint, caplog):
  """People cut models by config.json alone."""
  hf, tensors = checkpoint
  whole = params_from_huggingface(hf, tensors)[1]
  later = [name for name in tensors if name.startswith("model.layers.1.")]
  for prefix in ("", "model."):  # of a file of the bare class, too
    named = {name.removeprefix("model.") if not prefix else name: x for name, x in tensors.items()}
    caplog.clear()
    config, params = params_from_huggingface(hf | {"num_hidden_layers": 1}, named)
    assert config.num_layers == 1
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[:1]), params["blocks"], whole["blocks"])
    [line] = [record.getMessage() for record in caplog.records]
    assert line == f"config.json calls for 1 layers: {len(later)} tensors of later ones stand aside"


def test_a_cut_file_is_as_strict_about_the_layers_that_are_read(checkpoint):
  hf, tensors = checkpoint
  cut = hf | {"num_hidden_layers": 1}
  with pytest.raises(CheckpointError, match=r"has the tensor model\.layers\.0\.mlp\.norm\.weight,"):
    params_from_huggingface(cut, tensors | {"model.layers.0.mlp.norm.weight": np.zeros(16, np.float32)})
  del tensors["model.layers.0.mlp.up_proj.weight"]
  with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.0\.mlp\.up_proj\.weight"):
    params_from_huggingface(cut, tensors)


def test_buffers_and_the_copy_of_a_tied_head_are_not_unexpected(checkpoint):
  hf, tensors = checkpoint
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  params_from_huggingface(hf, tensors)
  assert params_from_huggingface(hf, tensors)[0].tie_embeddings


@pytest.mark.parametrize("family, config", [("llama", SMALL), ("gpt2", GPT2)])
def test_checkpoint_of_the_bare_model_has_no_prefix(family, config):
  params = oracle.random_params(config)
  hf, tensors = params_to_huggingface(config, family, params)
  prefix = FAMILIES[family].prefix
  assert all(name.startswith(prefix) for name in tensors)
  _, again = params_from_huggingface(hf, {name.removeprefix(prefix): x for name, x in tensors.items()})
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_dtype_is_kept(checkpoint):
  hf, tensors = checkpoint
  import ml_dtypes

  half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
  config, params = params_from_huggingface(hf, half)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
  _, again = params_to_huggingface(config, "llama", params)
  assert {x.dtype for x in again.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_a_parameter_of_another_shape():
  params = oracle.random_params(SMALL)
  params["final_norm"]["scale"] = np.ones(17, np.float32)
  with pytest.raises(CheckpointError, match=r"final_norm/scale has shape \(17,\)"):
    params_to_huggingface(SMALL, "llama", params)
  del params["final_norm"]
  with pytest.raises(CheckpointError, match="final_norm/scale"):
    params_to_huggingface(SMALL, "llama", params)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model_type": "mamba"}, "model_type 'mamba'"),
    ({"hidden_act": "prelu"}, "activation 'prelu'"),
    ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "'proportional'"),
  ],
)
def test_config_that_cannot_be_read(checkpoint, change, message):
  with pytest.raises(ConfigError, match=message):
    config_from_huggingface(checkpoint[0] | change)


def test_missing_key():
  """Its class in transformers has no default either."""
  with pytest.raises(ConfigError, match="lacks 'num_experts_per_tok'"):
    config_from_huggingface({"model_type": "deepseek_v2"})


def test_setting_that_the_family_here_does_not_have():
  hf = config_to_huggingface(GPT2, "gpt2")
  with pytest.raises(ConfigError, match="scale_attn_by_inverse_layer_idx = True"):
    config_from_huggingface(hf | {"scale_attn_by_inverse_layer_idx": True})


@pytest.mark.parametrize(
  "family, change, field",
  [
    ("llama", {"qk_norm": "head"}, "qk_norm"),
    ("llama", {"sliding_window": 4}, "sliding_window"),
    ("llama", {"logit_softcap": 30.0}, "logit_softcap"),
    ("llama", {"attention_bias": True}, "attention_out_bias"),
    ("mistral", {"sliding_window": 4, "layer_pattern": ("local", "global")}, "layer_pattern"),
    ("mistral", {"sliding_window": 4, "sink_tokens": 2}, "sink_tokens"),
    ("qwen2", {}, "attention_bias"),
    ("gpt2", {}, "num_kv_heads"),
    ("llama", {"moe": MoEConfig()}, "moe"),
    ("llama", {"layer_pattern": ("global", "nope")}, "layer_pattern"),
    ("mixtral", {"moe": MoEConfig(every=2)}, "moe"),
    ("mixtral", {"moe": MoEConfig(normalize=False)}, "moe"),
    ("gemma2", {"norm_placement": "sandwich", "norm_unit_offset": True}, "embedding_scale"),
  ],
)
def test_export_of_a_model_that_the_family_cannot_express(family, change, field):
  with pytest.raises(ConfigError, match=rf"a {family} checkpoint cannot say model\.{field}"):
    config_to_huggingface(dataclasses.replace(SMALL, **change), family)


def test_ntk_scaling_is_exported_as_its_theta():
  c = dataclasses.replace(SMALL, head_dim=8, rope_scaling=RopeScaling("ntk", factor=8.0))
  hf = config_to_huggingface(c, "llama")
  assert hf["rope_theta"] == pytest.approx(10000 * 8 ** (8 / 6)) and "rope_scaling" not in hf


# Without RoPE, with one setting for each kind of layer (see the families' tests), or without scaling.
OTHER_ROPE = {"gpt2", "gptj", "bloom", "gemma3", "gemma3_text", "olmo3", "opt", "phi3"}


@pytest.mark.parametrize("family", sorted({family.name for family in DECODERS} - OTHER_ROPE))
def test_two_spellings_of_rope(family):
  """Files from before 2026 and from after say the same."""
  hf = dict(
    model_type=family, vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24, max_position_embeddings=32, sliding_window=4, rms_norm_eps=1e-6,
    num_local_experts=4, num_experts=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
    moe_intermediate_size=8, first_k_dense_replace=1, routed_scaling_factor=1.0, n_group=1, topk_group=1,
    kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
  )  # fmt: skip
  old = hf | {"rope_theta": 5e5, "rotary_emb_base": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
  new = hf | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
  got = config_from_huggingface(old)
  assert got == config_from_huggingface(new)
  assert got.rope_theta == 5e5 and got.rope_scaling == RopeScaling("linear", 2.0)


def test_experts_of_some_layers_that_are_not_the_first():
  hf = config_to_huggingface(dataclasses.replace(SMALL, qk_norm="head", moe=MoEConfig(), norm_eps=1e-6), "qwen3_moe")
  with pytest.raises(ConfigError, match=r"mlp_only_layers = \[1\]; only the first layers"):
    config_from_huggingface(hf | {"mlp_only_layers": [1]})


def test_a_model_whose_code_is_another_familys():
  """Kimi-K2's config.json: DeepSeek-V3's in all but its name and sizes."""
  hf = dict(
    model_type="kimi_k2", architectures=["DeepseekV3ForCausalLM"], vocab_size=163840, hidden_size=7168,
    num_hidden_layers=61, num_attention_heads=64, num_key_value_heads=64, intermediate_size=18432,
    moe_intermediate_size=2048, n_routed_experts=384, num_experts_per_tok=8, n_shared_experts=1, n_group=1,
    topk_group=1, first_k_dense_replace=1, routed_scaling_factor=2.827, norm_topk_prob=True, q_lora_rank=1536,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, rms_norm_eps=1e-6,
    rope_theta=50000.0, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, hidden_act="silu",
    max_position_embeddings=131072, tie_word_embeddings=False, attention_bias=False,
    rope_scaling=dict(
      beta_fast=1.0, beta_slow=1.0, factor=32.0, mscale=1.0, mscale_all_dim=1.0, type="yarn",
      original_max_position_embeddings=4096,
    ),
  )  # fmt: skip
  c = config_from_huggingface(hf)
  assert c == config_from_huggingface(hf | {"model_type": "deepseek_v3"})
  assert 1.02e12 < sum(map(math.prod, param_shapes(c).values())) < 1.03e12  # "1T"
  assert config_to_huggingface(c, "deepseek_v3")["model_type"] == "deepseek_v3"


def test_scaling_that_a_phi3_does_not_have():
  hf = config_to_huggingface(dataclasses.replace(SMALL, tie_embeddings=False), "phi3")
  with pytest.raises(ConfigError, match="a phi3 has 'longrope' only"):
    config_from_huggingface(hf | {"rope_scaling": {"type": "linear", "factor": 2.0}})
  with pytest.raises(ConfigError, match=r"2 rotated pairs of a head, but 1 short_factors"):
    config_from_huggingface(hf | {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0, 3.0]}})


def test_several_models_in_one_checkpoint_are_read_only():
  with pytest.raises(ConfigError, match="write it as gemma3_text"):
    config_to_huggingface(SMALL, "gemma3")
