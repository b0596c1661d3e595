"""What the model tests share: compiled forwards, random weights, and Hugging Face models as oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.models.build import declare
from jaxllm.models.config import Compute

# The reference backend, whatever the target would choose; a loop over layers compiles in a third of the time.
XLA = Compute(attention="xla", unroll_layers=1)
# For programs that run once: LLVM's optimisations take a third of a compilation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def forward(config, compute=XLA):
  """(params, tokens, positions=, segment_ids=) -> logits, compiled once a config."""
  graph = declare(config, compute)[0]
  return jit(lambda params, tokens, **arrays: nnx.merge(graph, params)(tokens, **arrays)[0])


@functools.cache
def cached_step(config, compute=XLA):
  """(params, tokens, cache) -> (logits, cache), compiled once a config and length."""
  graph = declare(config, compute)[0]
  return jit(lambda params, tokens, cache: nnx.merge(graph, params)(tokens, cache=cache))


@functools.cache
def loss_and_grad(config, compute=XLA):
  """(params, tokens) -> (mean next-token cross-entropy, gradients), compiled once a config."""
  graph = declare(config, compute)[0]
  return jit(jax.value_and_grad(lambda params, tokens: cross_entropy(nnx.merge(graph, params)(tokens)[0], tokens)))


def cross_entropy(logits, tokens):
  """Mean of -log p(tokens[t + 1] | tokens[: t + 1])."""
  log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
  return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()


def random_params(config, seed=0):
  """Every weight random, norm scales and biases too: a scale of 1 hides a missing norm."""
  rng = np.random.default_rng(seed)

  def one(path, shape):
    leaf = path[-1].key
    x = rng.standard_normal(shape.shape).astype(np.float32)
    if leaf == "scale":
      return 0.2 * x + (0.0 if config.norm_unit_offset else 1.0)
    if leaf in ("bias", "sinks"):
      return 0.3 * x
    return x if leaf in ("tokens", "positions") else x * shape.shape[-2] ** -0.5

  return jax.tree_util.tree_map_with_path(one, declare(config)[1])


def torch_model(cls, config, seed=0):
  """A transformers model in float32 with every parameter random."""
  import torch

  config._attn_implementation = "eager"  # the only one with soft-caps and sinks
  torch.manual_seed(seed)
  model = cls(config).eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      x = torch.randn_like(p)
      if p.ndim == 1:
        is_scale = name.endswith("weight") and "gemma" not in config.model_type
        p.copy_(0.2 * x + (1.0 if is_scale else 0.0))
      else:
        embedding = any(word in name for word in ("embed", "wte", "wpe"))
        p.copy_(x if embedding else x * p.shape[-1] ** -0.5)
  return model


def assert_close(got, want, tolerance=1e-5):
  """Equal but for float32's rounding: within `tolerance` of the spread of what is wanted, or of 1 where that is more.

  Logits of random weights spread over 5 and more, and a sum of some dozen products of that size is rounded by as much.
  """
  np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, float(np.std(want))))


def tensors_of(model):
  """The tensors of a checkpoint of the model: a tied head is not among them."""
  tied = model.config.tie_word_embeddings
  state = {name: t.numpy().copy() for name, t in model.state_dict().items()}
  return {name: t for name, t in state.items() if not (tied and name == "lm_head.weight")}
