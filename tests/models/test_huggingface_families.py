"""Every family against its `transformers` implementation with random weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoint_arrays import params_from_huggingface, params_to_huggingface  # noqa: E402

from jaxllm.models.caches import init_cache  # noqa: E402

B, T, V = 2, 24, 97
TOLERANCE = 1e-4
SMALL = dict(
  vocab_size=V,
  hidden_size=32,
  intermediate_size=56,
  num_hidden_layers=3,
  num_attention_heads=4,
  max_position_embeddings=64,
  bos_token_id=1,
  eos_token_id=2,
  pad_token_id=0,
)
GPT2 = dict(
  vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
LLAMA3 = dict(
  rope_type="llama3",
  factor=4.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
CASES = {
  "llama-mha": ("Llama", SMALL),
  "llama-gqa-tied": (
    "Llama",
    SMALL | dict(num_key_value_heads=2, tie_word_embeddings=True, rope_theta=500.0),
  ),
  "llama-mqa-biases": ("Llama", SMALL | dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True)),
  "llama-head-dim": ("Llama", SMALL | dict(num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-3)),
  "llama-linear": ("Llama", SMALL | dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
  "llama-llama3": ("Llama", SMALL | dict(num_key_value_heads=2, rope_scaling=LLAMA3)),
  "llama-yarn": ("Llama", SMALL | dict(rope_scaling=YARN)),
  "llama-gelu": ("Llama", SMALL | dict(hidden_act="gelu")),
  "mistral-window": ("Mistral", SMALL | dict(num_key_value_heads=2, sliding_window=7)),
  "mistral-no-window": ("Mistral", SMALL | dict(num_key_value_heads=1, sliding_window=None, head_dim=16)),
  "qwen2-tied": ("Qwen2", SMALL | dict(num_key_value_heads=2, tie_word_embeddings=True)),
  "qwen2-some-local": (
    "Qwen2",
    SMALL | dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1),
  ),
  "qwen3": ("Qwen3", SMALL | dict(num_key_value_heads=2, head_dim=16)),
  "qwen3-biases-yarn": (
    "Qwen3",
    SMALL
    | dict(num_key_value_heads=1, head_dim=8, attention_bias=True, rope_scaling=YARN | dict(attention_factor=1.3)),
  ),
  "gemma2": (
    "Gemma2",
    SMALL
    | dict(num_key_value_heads=2, head_dim=8, sliding_window=6, query_pre_attn_scalar=11)
    | dict(attn_logit_softcapping=1.5, final_logit_softcapping=3.0),
  ),
  "gemma2-mqa-biases": (
    "Gemma2",
    SMALL
    | dict(num_key_value_heads=1, head_dim=12, sliding_window=4, attention_bias=True, num_hidden_layers=4)
    | dict(attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=12),
  ),
  "gpt2": ("GPT2", GPT2),
  "gpt2-untied": ("GPT2", GPT2 | dict(n_inner=48, tie_word_embeddings=False, layer_norm_epsilon=1e-3)),
  "gpt2-relu": ("GPT2", GPT2 | dict(activation_function="relu")),
  "gpt_neox": ("GPTNeoX", SMALL | dict(rotary_pct=0.5)),
  "gpt_neox-sequential": ("GPTNeoX", SMALL | dict(rotary_pct=0.25, use_parallel_residual=False)),
  "olmo2": ("Olmo2", SMALL | dict(num_key_value_heads=2)),
  "bloom": ("Bloom", dict(vocab_size=V, hidden_size=36, n_layer=3, n_head=6, bos_token_id=1, eos_token_id=2)),
}
# Of each family the case with the most in it; what a cache does does not depend on the rest.
CACHED = (
  "llama-llama3",
  "llama-mqa-biases",
  "mistral-window",
  "qwen2-some-local",
  "qwen3-biases-yarn",
  "gemma2",
  "gpt2",
  "gpt_neox",
  "olmo2",
  "bloom",
)


@functools.cache
def case(name):
  """(transformers model, ModelConfig, params, tokens, its logits)."""
  stem, settings = CASES[name]
  hf_config = getattr(transformers, f"{stem}Config")(**settings)
  head = "GPT2LMHeadModel" if stem == "GPT2" else f"{stem}ForCausalLM"
  model = oracle.torch_model(getattr(transformers, head), hf_config)
  config, params = params_from_huggingface(hf_config.to_dict(), oracle.tensors_of(model))
  tokens = np.random.default_rng(1).integers(3, V, (B, T))
  with torch.no_grad():
    logits = model(torch.tensor(tokens)).logits.numpy()
  return model, config, params, tokens, logits


@pytest.mark.parametrize("name", CASES)
def test_logits_and_loss(name):
  model, config, params, tokens, want = case(name)
  # With positions and segments, as packed batches have them: one compilation serves both tests.
  places = dict(positions=np.broadcast_to(np.arange(T), (B, T)), segment_ids=np.ones((B, T), np.int32))
  got = oracle.forward(config)(params, tokens, **places)
  assert 0.3 < want.std() < 30  # else the tolerance says nothing
  np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
  with torch.no_grad():
    want_loss = model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.item()
  assert abs(float(oracle.cross_entropy(got, tokens)) - want_loss) < TOLERANCE


@pytest.mark.parametrize("name", CACHED)
def test_cached_decode(name):
  _, config, params, tokens, want = case(name)
  step = oracle.cached_step(config)
  # The second row stands two tokens behind: its stale slots must not be seen.
  first, cache = step(params, tokens[:, :9], init_cache(config, B, T + 3))
  cache = dataclasses.replace(cache, length=jnp.array([9, 7]))
  np.testing.assert_allclose(first, want[:, :9], rtol=0, atol=TOLERANCE)
  for t in range(9, T):
    now = np.array([tokens[0, t], tokens[1, t - 2]])[:, None]
    logits, cache = step(params, now, cache)
    np.testing.assert_allclose(logits[:, 0], [want[0, t], want[1, t - 2]], rtol=0, atol=TOLERANCE)
  assert cache.length.tolist() == [T, T - 2]


@pytest.mark.parametrize("name", CASES)
def test_packed_documents(name):
  model, config, params, tokens, _ = case(name)
  lengths = [(10, 5, 6), (4, 17, 0)]  # the rest of a row is padding
  positions, segments = np.zeros((B, T), np.int64), np.zeros((B, T), np.int32)
  want = np.zeros((B, T, V), np.float32)
  for b, row in enumerate(lengths):
    start = 0
    for document, length in enumerate(row):
      here = slice(start, start + length)
      positions[b, here], segments[b, here] = np.arange(length), document + 1
      if length:
        with torch.no_grad():
          want[b, here] = model(torch.tensor(tokens[b : b + 1, here])).logits[0].numpy()
      start += length
  got = oracle.forward(config)(params, tokens, positions=positions, segment_ids=segments)
  real = segments > 0
  np.testing.assert_allclose(np.asarray(got)[real], want[real], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_export(name):
  model, config, params, tokens, want = case(name)
  hf, tensors = params_to_huggingface(config, model.config.model_type, params)
  # GPT-NeoX's files and transformers' classes have different names for it.
  tensors = {tensor_name.replace("embed_out", "lm_head"): tensor for tensor_name, tensor in tensors.items()}
  original = oracle.tensors_of(model)
  assert tensors.keys() == original.keys()
  for tensor_name, tensor in tensors.items():
    np.testing.assert_array_equal(tensor, original[tensor_name], err_msg=tensor_name)
  # The written config.json alone, without the original's settings, makes the same model.
  cls = type(model)
  again = cls(cls.config_class(**hf, pad_token_id=0, attn_implementation="eager")).eval()
  missing, unexpected = again.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=False)
  assert not unexpected and set(missing) <= {"lm_head.weight"}
  again.tie_weights()
  with torch.no_grad():
    np.testing.assert_array_equal(again(torch.tensor(tokens)).logits.numpy(), want)


def test_gradients_against_autograd():
  model, config, params, tokens, _ = case("qwen3")
  model.zero_grad()
  model(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()
  wanted = {name: p.grad.numpy() for name, p in model.named_parameters()}
  _, gradients = oracle.loss_and_grad(config)(params, jnp.asarray(tokens))
  _, got = params_to_huggingface(config, "qwen3", jax.tree.map(np.asarray, gradients))
  assert got.keys() == wanted.keys()
  for tensor_name, want in wanted.items():
    scale = np.abs(want).max()
    assert scale > 0
    np.testing.assert_allclose(got[tensor_name], want, rtol=0, atol=2e-5 * scale, err_msg=tensor_name)
