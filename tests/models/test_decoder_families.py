"""Decoder families against transformers with random weights, as `save_pretrained` writes them: padded batches,
greedy decoding, and the way back. (test_huggingface_families.py has more settings of the older ones.)"""

import functools
import json
import tempfile

import jax
import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoint_arrays import params_from_huggingface, params_to_huggingface  # noqa: E402
from flax import nnx  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from jaxllm.inference.model import Model  # noqa: E402
from jaxllm.interop.families import DECODERS  # noqa: E402
from jaxllm.models.build import declare  # noqa: E402

B, T, V, NEW = 2, 20, 97, 10
SMALL = dict(
  vocab_size=V, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
  max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GQA = SMALL | dict(num_key_value_heads=2)
QWEN_MOE = GQA | dict(head_dim=8, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20)
DEEPSEEK = SMALL | dict(
  num_key_value_heads=4, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10, q_lora_rank=None,
  n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=12, first_k_dense_replace=1,
)  # fmt: skip
GROUPS = dict(n_group=4, topk_group=2)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.9)
GEMMA3 = GQA | dict(head_dim=12, num_hidden_layers=7, sliding_window=5, query_pre_attn_scalar=20)
OPT = dict(
  vocab_size=V, hidden_size=32, ffn_dim=56, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
  bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
YARN4 = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
MULTIPLIERS = dict(embedding_multiplier=3.0, logits_scaling=0.7, residual_multiplier=0.4, attention_multiplier=0.2)
GPT_OSS = GQA | dict(head_dim=8, num_local_experts=6, num_experts_per_tok=2, sliding_window=6, swiglu_limit=7.0)
NO_YARN = dict(rope_type="default", rope_theta=1e4)
LONG = dict(
  original_max_position_embeddings=16,
  rope_scaling=dict(rope_type="longrope", short_factor=[1.0, 1.1, 1.3], long_factor=[1.0, 2.0, 5.0]),
)
UNTIED = dict(tie_word_embeddings=False)
FALCON = dict(vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, eos_token_id=2, pad_token_id=0)
NEWER = {
  "mixtral": ("Mixtral", GQA | dict(num_local_experts=5, sliding_window=9)),
  "qwen3_moe": ("Qwen3Moe", QWEN_MOE | dict(decoder_sparse_step=2, norm_topk_prob=True)),
  "qwen3_moe-first-dense": ("Qwen3Moe", QWEN_MOE | dict(mlp_only_layers=[0])),
  "deepseek_v2": ("DeepseekV2", DEEPSEEK | dict(rope_scaling=YARN, routed_scaling_factor=1.5)),
  "deepseek_v2-groups": (
    "DeepseekV2",
    DEEPSEEK | GROUPS | dict(topk_method="group_limited_greedy", q_lora_rank=14, attention_bias=True),
  ),
  "deepseek_v3": ("DeepseekV3", DEEPSEEK | GROUPS | dict(q_lora_rank=14, rope_scaling=YARN)),
  "gemma": ("Gemma", SMALL | dict(num_key_value_heads=1, head_dim=12)),
  "gemma3_text": ("Gemma3Text", GEMMA3 | dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
  "phi3": ("Phi3", GQA | dict(sliding_window=9, partial_rotary_factor=0.5)),
  "phi3-long": ("Phi3", GQA | dict(partial_rotary_factor=0.75) | LONG),
  "llama-dynamic": ("Llama", GQA | dict(rope_scaling=dict(rope_type="dynamic", factor=4.0))),
  "smollm3": ("SmolLM3", GQA | dict(num_hidden_layers=5)),
  "opt": ("OPT", OPT),
  "opt-post": ("OPT", OPT | dict(do_layer_norm_before=False, tie_word_embeddings=False)),
  "opt-bare-bones": ("OPT", OPT | dict(enable_bias=False, layer_norm_elementwise_affine=False)),
  "olmo": ("Olmo", GQA),
  "olmo-clipped": ("Olmo", GQA | dict(clip_qkv=0.5, attention_bias=True, hidden_act="quick_gelu")),
  "starcoder2": ("Starcoder2", GQA | dict(sliding_window=7)),
  "starcoder2-no-biases": ("Starcoder2", GQA | dict(use_bias=False, tie_word_embeddings=False)),
  "olmo3": ("Olmo3", GQA | dict(num_hidden_layers=5, sliding_window=6, rope_scaling=YARN4, rope_theta=5e5)),
  "granite": ("Granite", GQA | MULTIPLIERS | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
  "glm": ("Glm", GQA | dict(head_dim=16)),
  "glm4": ("Glm4", GQA | dict(head_dim=16, attention_bias=False)),
  "falcon": ("Falcon", FALCON),
  "falcon-alibi": ("Falcon", FALCON | dict(alibi=True, parallel_attn=False, multi_query=False, bias=True) | UNTIED),
  "falcon-new": ("Falcon", FALCON | dict(new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False)),
  "falcon-11b": ("Falcon", FALCON | dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)),
  "gptj": ("GPTJ", dict(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4, eos_token_id=2)),
  "gpt_oss": ("GptOss", GPT_OSS),
  "gpt_oss-global": ("GptOss", GPT_OSS | dict(layer_types=["full_attention"] * 3, rope_parameters=NO_YARN)),
  "cohere": ("Cohere", GQA | dict(logit_scale=2.0)),
  "cohere-norms": (
    "Cohere",
    GQA | dict(use_qk_norm=True, attention_bias=True, tie_word_embeddings=False, logit_scale=0.9),
  ),
  "cohere2": ("Cohere2", GQA | dict(num_hidden_layers=5, sliding_window=6, logit_scale=3.0)),
}
OLDER = {
  "llama": ("Llama", GQA),
  "mistral": ("Mistral", GQA | dict(sliding_window=7)),
  "qwen2": ("Qwen2", GQA | dict(tie_word_embeddings=True)),
  "qwen3": ("Qwen3", GQA | dict(head_dim=16)),
  "gemma2": ("Gemma2", GQA | dict(head_dim=8, sliding_window=6)),
  "gpt2": ("GPT2", dict(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=64, eos_token_id=2)),
  "gpt_neox": ("GPTNeoX", SMALL | dict(rotary_pct=0.5)),
  "olmo2": ("Olmo2", GQA),
  "bloom": ("Bloom", dict(vocab_size=V, hidden_size=36, n_layer=3, n_head=6, eos_token_id=2, pad_token_id=0)),
}
# Each choice of the block is decoded through the engine in one of them at least; the others take their time.
DECODED = {
  "phi3-long",
  "mixtral",
  "deepseek_v2",
  "gemma3_text",
  "phi3",
  "smollm3",
  "falcon-alibi",
  "granite",
  "cohere-norms",
  "gpt_oss",
}
ALL = [*NEWER, *(pytest.param(name, marks=pytest.mark.slow) for name in OLDER)]
GREEDY = [pytest.param(name, marks=() if name in DECODED else pytest.mark.slow) for name in NEWER | OLDER]
EXPERTS = [name for name in NEWER if name.startswith(("mixtral", "qwen3", "deepseek"))]
CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def test_every_family_is_here():
  here = {name.split("-")[0] for name in NEWER | OLDER}
  assert here | {"gemma3"} == {family.name for family in DECODERS}


@functools.cache
def case(name):
  """(transformers model, its config.json, its file's tensors, ModelConfig, params)."""
  stem, settings = (NEWER | OLDER)[name]
  config = getattr(transformers, f"{stem}Config")(**settings)
  model = oracle.torch_model(getattr(transformers, CLASSES.get(stem, f"{stem}ForCausalLM")), config)
  if stem == "Falcon":
    model.config._attn_implementation = "sdpa"  # its eager one adds ALiBi twice
  with torch.no_grad():
    if config.tie_word_embeddings:  # else the token itself is all that the head sees
      model.get_input_embeddings().weight.mul_(0.1)
    for key, buffer in model.named_buffers():
      if key.endswith("e_score_correction_bias"):
        buffer.copy_(0.3 * torch.randn_like(buffer))
  with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    tensors = load_file(f"{directory}/model.safetensors")
    with open(f"{directory}/config.json", encoding="utf-8") as file:
      hf = json.load(file)
  return model, hf, tensors, *params_from_huggingface(hf, tensors)


@functools.cache
def forward(config):
  graph = declare(config, oracle.XLA)[0]

  @oracle.jit
  def run(params, tokens, segment_ids):
    model = nnx.merge(graph, params)
    hidden, _ = model.hidden(tokens, segment_ids=segment_ids)
    return hidden, model.logits(hidden)

  return run


@pytest.mark.parametrize("name", ALL)
def test_padded_batch(name):
  model, _, _, config, params = case(name)
  tokens = np.random.default_rng(1).integers(3, V, (B, T))
  mask = (np.arange(T) < np.array([[T], [13]])).astype(np.int32)
  hidden, logits = forward(config)(params, tokens, mask)
  with torch.no_grad():
    want = model(torch.tensor(tokens), attention_mask=torch.tensor(mask), output_hidden_states=True)
  real = mask == 1
  if config.rope_switch is not None:  # by the longest text at hand in transformers, here each by its own length
    real[1] = False
  want_hidden, want_logits = want.hidden_states[-1].numpy()[real], want.logits.numpy()[real]
  assert 0.3 < want_logits.std() < 30  # else the tolerance says nothing
  oracle.assert_close(np.asarray(hidden)[real], want_hidden)
  oracle.assert_close(np.asarray(logits)[real], want_logits)


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_decoding_through_the_cache(name):
  model, _, _, config, params = case(name)
  more = 12 if name == "phi3-long" else 0  # longer than its original context
  lengths = (2, 9 + more), (3, 5 + more)
  prompts = [np.random.default_rng(seed).integers(3, V, length).tolist() for seed, length in lengths]
  completions = Model(config, params).generate(prompts, temperature=0.0, max_tokens=NEW)
  for prompt, completion in zip(prompts, completions, strict=True):
    ids = torch.tensor([prompt])
    want = model.generate(
      ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=None
    )
    assert list(completion.token_ids) == want[0, len(prompt) :].tolist()
  assert len({token for completion in completions for token in completion.token_ids}) > 1


@pytest.mark.parametrize("name", [*NEWER, "gpt_neox"])
def test_export(name, tmp_path):
  model, _, original, config, params = case(name)
  hf, tensors = params_to_huggingface(config, model.config.model_type, params)
  assert tensors.keys() == original.keys()
  for tensor_name, tensor in tensors.items():
    np.testing.assert_array_equal(tensor, original[tensor_name], err_msg=tensor_name)
  save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
  (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": 0} | hf))  # 0: inside this vocabulary
  implementation = model.config._attn_implementation
  again, info = type(model).from_pretrained(tmp_path, attn_implementation=implementation, output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  for tensor_name, tensor in again.state_dict().items():
    np.testing.assert_array_equal(tensor.numpy(), model.state_dict()[tensor_name].numpy(), err_msg=tensor_name)
  tokens = torch.tensor(np.random.default_rng(4).integers(3, V, (B, T)))
  with torch.no_grad():
    np.testing.assert_array_equal(again(tokens).logits.numpy(), model(tokens).logits.numpy())
  assert params_from_huggingface(hf, tensors)[0] == config


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_one_tensor(name):
  """As transformers holds them in memory, and some files do."""
  model, hf, tensors, config, params = case(name)
  fused = oracle.tensors_of(model)
  assert fused.keys() != tensors.keys() and any(key.endswith("experts.gate_up_proj") for key in fused)
  got_config, got = params_from_huggingface(hf, fused)
  assert got_config == config
  jax.tree.map(np.testing.assert_array_equal, got, params)
  bare = {key.removeprefix("model."): tensor for key, tensor in fused.items()}
  jax.tree.map(np.testing.assert_array_equal, params_from_huggingface(hf, bare)[1], params)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_gradients_against_autograd(name):
  model, _, _, config, params = case(name)
  tokens = np.random.default_rng(5).integers(3, V, (B, T))
  model.zero_grad()
  model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()
  _, gradients = oracle.loss_and_grad(config)(params, tokens)
  _, got = params_to_huggingface(config, model.config.model_type, jax.tree.map(np.asarray, gradients))
  renamed = {key: p.grad.numpy() for key, p in model.named_parameters()}
  want = params_to_huggingface(
    config,
    model.config.model_type,
    params_from_huggingface(case(name)[1], with_buffers(renamed, got))[1],
  )[1]
  for tensor_name, gradient in want.items():
    scale = max(np.abs(gradient).max(), 1e-3)
    np.testing.assert_allclose(got[tensor_name], gradient, rtol=0, atol=2e-5 * scale, err_msg=tensor_name)


def with_buffers(gradients, got):
  """The buffers that choose experts have no gradient in either."""
  buffers = {key: value for key, value in got.items() if key.endswith("e_score_correction_bias")}
  assert all(not value.any() for value in buffers.values())
  return gradients | buffers


def test_the_layer_that_predicts_one_more_token_is_left_aside():
  _, hf, tensors, config, params = case("deepseek_v3")
  more = {"model.layers.3.eh_proj.weight": np.zeros((2, 2), np.float32)}
  got_config, got = params_from_huggingface(hf | {"num_nextn_predict_layers": 1}, tensors | more)
  assert got_config == config
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_the_language_model_of_a_gemma_that_sees():
  """Its file has a vision tower too, and its config.json an object for each."""
  vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
  config = transformers.Gemma3Config(
    text_config=GEMMA3, vision_config=vision | dict(patch_size=14), mm_tokens_per_image=4, image_token_index=90
  )
  model = oracle.torch_model(transformers.Gemma3ForConditionalGeneration, config)
  tokens = np.random.default_rng(6).integers(3, 80, (B, T))
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits.numpy()
  with tempfile.TemporaryDirectory() as directory:
    model.save_pretrained(directory)
    tensors = load_file(f"{directory}/model.safetensors")
  hf = config.to_dict()
  for names in (tensors, {key.removeprefix("model."): tensor for key, tensor in tensors.items()}):
    c, params = params_from_huggingface(hf, names)
    _, logits = forward(c)(params, tokens, np.ones((B, T), np.int32))
    oracle.assert_close(logits, want)
