"""Hugging Face checkpoints as arrays in memory, for tests that need no files."""

from flax import traverse_util

from jaxllm.interop.huggingface import from_huggingface, to_huggingface
from jaxllm.interop.stored import tensors_of
from jaxllm.interop.tensors import in_memory


def params_from_huggingface(config, tensors):
  """(config.json, arrays by name) -> (ModelConfig, nested dict of arrays)."""
  c, params = from_huggingface(config, in_memory(tensors))
  return c, traverse_util.unflatten_dict({path: tensor.read() for path, tensor in params.items()}, sep="/")


def params_to_huggingface(config, family, params):
  """(ModelConfig, family, nested dict of arrays) -> (config.json, arrays by name)."""
  hf, tensors = to_huggingface(config, family, tensors_of(params))
  return hf, {name: tensor.read() for name, tensor in tensors.items()}
