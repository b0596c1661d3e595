"""Checkpoints are converted without reading more than the tensor at hand."""

import dataclasses

import numpy as np
import oracle
import pytest
from checkpoint_arrays import params_to_huggingface
from flax import traverse_util

from jaxllm.base.errors import CheckpointError
from jaxllm.interop.huggingface import from_huggingface, to_huggingface
from jaxllm.interop.tensors import LazyTensor
from jaxllm.models.config import ModelConfig

GPT2 = ModelConfig(
  vocab_size=11, embed_dim=16, num_layers=3, num_heads=4, mlp_dim=24, max_seq_len=32, position="learned",
  norm="layernorm", mlp="gelu_tanh", attention_bias=True, attention_out_bias=True, mlp_bias=True,
)  # fmt: skip


@pytest.fixture
def checkpoint():
  """(parameters by path, config.json, lazy tensors, the names read so far)."""
  params = oracle.random_params(GPT2)
  hf, arrays = params_to_huggingface(GPT2, "gpt2", params)
  names = []

  def watched(name):
    return LazyTensor(arrays[name].shape, arrays[name].dtype, lambda: names.append(name) or arrays[name])

  return traverse_util.flatten_dict(params, sep="/"), hf, {name: watched(name) for name in arrays}, names


def test_a_layer_is_read_from_the_one_tensor_that_holds_it(checkpoint):
  params, hf, tensors, names = checkpoint
  _, lazy = from_huggingface(hf, tensors)
  assert not names
  key = lazy["blocks/attention/key/weight"]
  np.testing.assert_array_equal(key.part((1,)), params["blocks/attention/key/weight"][1])
  np.testing.assert_array_equal(key.part((2, 5)), params["blocks/attention/key/weight"][2, 5])
  assert names == ["transformer.h.1.attn.c_attn.weight", "transformer.h.2.attn.c_attn.weight"]
  for path, want in params.items():
    np.testing.assert_array_equal(lazy[path].read(), want)
    np.testing.assert_array_equal(np.reshape(list(lazy[path].parts()), want.shape), want)


def test_there_and_back_is_lazy_too(checkpoint):
  _, hf, tensors, names = checkpoint
  config, lazy = from_huggingface(hf, tensors)
  _, again = to_huggingface(config, "gpt2", lazy)
  assert not names
  np.testing.assert_array_equal(again["transformer.h.2.mlp.c_fc.weight"].read(), tensors[names[0]].read())
  assert set(names) == {"transformer.h.2.mlp.c_fc.weight"}


def test_layers_of_two_types_become_the_wider_one(checkpoint):
  _, hf, tensors, _ = checkpoint
  name = "transformer.h.1.mlp.c_fc.weight"
  tensors[name] = dataclasses.replace(tensors[name], dtype=np.dtype(np.float64))
  assert from_huggingface(hf, tensors)[1]["blocks/mlp/up/weight"].dtype == np.float64


def test_a_quantized_checkpoint_is_refused(checkpoint):
  _, hf, tensors, names = checkpoint
  name = "transformer.h.1.mlp.c_fc.weight"
  tensors[name] = dataclasses.replace(tensors[name], dtype=np.dtype(np.int8))
  with pytest.raises(CheckpointError, match=rf"{name} has type int8.*quantized"):
    from_huggingface(hf, tensors)
  assert not names
