"""Single formulas against `transformers`: RoPE scalings, ALiBi slopes, gpt-oss's sinks."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.bloom.modeling_bloom import build_alibi_tensor  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward  # noqa: E402

from jaxllm.interop.families.rope import read_rope  # noqa: E402
from jaxllm.kernels import Visibility, flash_attention  # noqa: E402
from jaxllm.models.positions import alibi_slopes, rope_frequencies  # noqa: E402

LENGTH = "original_max_position_embeddings"
SCALINGS = [
  {"rope_type": "linear", "factor": 3.0},
  {"rope_type": "yarn", "factor": 4.0, LENGTH: 2048},
  {
    "rope_type": "yarn",
    "factor": 16.0,
    LENGTH: 4096,
    "beta_fast": 20.0,
    "beta_slow": 2.0,
    "attention_factor": 1.2,
  },
  {"rope_type": "yarn", "factor": 40.0, LENGTH: 4096, "mscale": 1.0, "mscale_all_dim": 0.8},
  {"rope_type": "llama3", "factor": 8.0, LENGTH: 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
  {"rope_type": "llama3", "factor": 32.0, LENGTH: 1024, "low_freq_factor": 2.0, "high_freq_factor": 8.0},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s['rope_type']}-{s['factor']}")
@pytest.mark.parametrize("head_dim, theta", [(128, 500000.0), (64, 10000.0)])
def test_rope_frequencies(scaling, head_dim, theta):
  hf = transformers.LlamaConfig(
    hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_theta=theta,
    max_position_embeddings=131072, rope_scaling=scaling,
  )  # fmt: skip
  want, want_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](hf, "cpu")
  ours = read_rope(hf.to_dict())
  got, factor = rope_frequencies(head_dim, ours["rope_theta"], ours["rope_scaling"])
  np.testing.assert_allclose(got, want.numpy(), rtol=2e-6)
  assert factor == pytest.approx(want_factor)


@pytest.mark.parametrize("num_heads", [1, 6, 8, 12, 32])
def test_alibi_slopes(num_heads):
  bias = build_alibi_tensor(torch.ones(1, 5), num_heads, torch.float32)  # [N, 1, S]: slope * position
  np.testing.assert_allclose(alibi_slopes(num_heads), bias[:, 0, 1].numpy(), rtol=1e-6)


def test_sinks_as_gpt_oss_has_them():
  B, T, N, K, H, window = 2, 9, 6, 2, 8, 4
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((B, T, heads, H)) for heads in (N, K, K))
  sinks = rng.standard_normal(N) + 1
  t = np.arange(T)
  hidden = (t[None] > t[:, None]) | (t[:, None] - t[None] >= window)
  mask = torch.tensor(np.where(hidden, -np.inf, 0.0))[None, None]
  module = types.SimpleNamespace(sinks=torch.tensor(sinks), num_key_value_groups=N // K, training=False)
  transposed = [torch.tensor(x).transpose(1, 2) for x in (q, k, v)]
  want, _ = eager_attention_forward(module, *transposed, mask, scaling=H**-0.5)
  got = flash_attention(
    *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), visibility=Visibility(window=window),
    sinks=jnp.asarray(sinks, jnp.float32),
  )  # fmt: skip
  np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=2e-6)
