"""FLOPs against PyTorch's counter and hand-worked sizes; the chip table against device names."""

import numpy as np
import pytest

from jaxllm.models.config import ModelConfig
from jaxllm.training.flops import (
  matmul_parameters,
  mfu,
  row_flops,
  training_flops,
  visible_keys,
)


def test_gpt2_small_by_hand():
  config = ModelConfig(
    vocab_size=50257, embed_dim=768, num_layers=12, num_heads=12, mlp="gelu_tanh", position="learned"
  )
  # 12 layers of 12 d^2, and the head; PaLM's attention term is 12 L H Q T.
  assert matmul_parameters(config) == 12 * 12 * 768**2 + 50257 * 768
  palm = training_flops(config, 1024, causal=False)
  assert palm.total == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 12 * 64 * 1024
  ours = training_flops(config, 1024)
  assert ours.attention == palm.attention * 1025 / 2048 and ours.matmul == palm.matmul
  assert ours.formula == "6 x 123,532,032 weights + 12 x 12 layers x 768 wide x 512.5 keys"
  assert training_flops(config, 1024, train_weights=False).matmul == palm.matmul * 4 / 6


@pytest.mark.parametrize("seq_len, window, sinks", [(7, None, 0), (9, 4, 0), (9, 4, 2), (5, 8, 0), (6, 1, 0)])
def test_visible_keys_by_counting_the_mask(seq_len, window, sinks):
  query, key = np.indices((seq_len, seq_len))
  mask = key <= query
  if window is not None:
    # With sinks a query sees its window and the first tokens; until they part, they overlap.
    mask &= (query - key < window) | (key < sinks)
  assert visible_keys(seq_len, window, sinks) == pytest.approx(mask.sum() / seq_len)


def test_local_layers_are_cheaper():
  sizes = dict(vocab_size=100, embed_dim=64, num_layers=5, num_heads=4, sliding_window=8)
  mixed = training_flops(ModelConfig(**sizes, layer_pattern=("local", "local", "global")), 64)
  local, full = visible_keys(64, 8), visible_keys(64)
  assert mixed.attention == 12 * 64 * (4 * local + full)  # local, local, global, local, local


def test_an_encoder_decoder_against_pytorchs_flop_counter():
  torch = pytest.importorskip("torch")  # in the test extra of Python 3.11 only
  from torch.utils.flop_counter import FlopCounterMode
  from transformers import T5Config, T5ForConditionalGeneration

  V, S, T = 96, 24, 10
  hf = T5Config(vocab_size=V, d_model=32, d_kv=16, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4,
                decoder_start_token_id=0)  # fmt: skip
  model = T5ForConditionalGeneration(hf)
  with FlopCounterMode(display=False) as counter:
    model(input_ids=torch.ones(1, S, dtype=torch.long), labels=torch.ones(1, T, dtype=torch.long)).loss.backward()
  config = ModelConfig(vocab_size=V, embed_dim=32, num_layers=2, num_encoder_layers=3, num_heads=4, head_dim=16,
                       mlp_dim=48, mlp="relu", architecture="encoder_decoder", position="relative")  # fmt: skip
  # transformers computes the half of the decoder's scores that the mask hides; we do not count it.
  hidden_half = 12 * 64 * 2 * (T - visible_keys(T)) * T
  assert row_flops(config, T, S).total * (S + T) + hidden_half == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_an_encoder_sees_all_of_a_row_and_labels_take_the_place_of_the_vocabulary():
  sizes = dict(vocab_size=100, embed_dim=64, num_layers=5, num_heads=4, architecture="encoder")
  masked = row_flops(ModelConfig(**sizes), 32)
  assert masked == training_flops(ModelConfig(**sizes), 32, causal=False)
  labels = row_flops(ModelConfig(**sizes, head="sequence", num_labels=3), 32)
  assert labels.matmul == masked.matmul - 6 * 64 * (100 - 3) and labels.attention == masked.attention
  taps = row_flops(ModelConfig(**sizes, convolution_size=3), 32)  # multiply a token and its two neighbours
  assert taps.matmul == masked.matmul + 6 * 3 * 64 * 64


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_against_pytorchs_flop_counter(kv_heads):
  torch = pytest.importorskip("torch")  # in the test extra of Python 3.11 only
  from torch.utils.flop_counter import FlopCounterMode
  from transformers import LlamaConfig, LlamaForCausalLM

  config = ModelConfig(
    vocab_size=96, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=kv_heads, head_dim=16, mlp_dim=48
  )
  llama = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=kv_heads,
    head_dim=16,
    attn_implementation="eager",
  )
  model = LlamaForCausalLM(llama)
  model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.clone()
  tokens = torch.zeros((2, 24), dtype=torch.long)
  with FlopCounterMode(display=False) as counter:
    model(tokens).logits.sum().backward()
  rope = 2 * 2 * 24 * 8  # the table of angles is an outer product, counted once, forward only
  per_token = counter.get_total_flops() / 48
  ours = training_flops(config, 24, causal=False).total
  assert abs(per_token - ours) <= rope / 24, (per_token, ours)


def test_mfu():
  assert mfu(1000.0, 2e9, 4, 1e12) == 0.5
