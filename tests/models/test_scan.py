"""The scanned stack: unrolling, remainders and rematerialisation change the program and not the numbers."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from jaxllm.models.build import declare, init_params
from jaxllm.models.caches import init_cache
from jaxllm.models.config import Compute, ModelConfig

C = ModelConfig(vocab_size=31, embed_dim=16, num_layers=5, num_heads=2, mlp_dim=32, max_seq_len=32)
PATTERN = dataclasses.replace(C, sliding_window=3, layer_pattern=("local", "global"))  # 5 = 2 * 2 + 1
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 12)))


def lowered_gradient(config, compute, **options):
  """The gradient's program for a config, from shapes alone."""
  graph, shapes, _ = declare(config, compute)

  def loss(params, tokens):
    return oracle.cross_entropy(nnx.merge(graph, params)(tokens)[0], tokens)

  return jax.jit(jax.grad(loss)).trace(shapes, jax.ShapeDtypeStruct((2, 12), jnp.int32)).lower(**options)


def same(got, want, tolerance=1e-6):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("config", [C, PATTERN], ids=["plain", "pattern"])
@pytest.mark.parametrize("unroll", [None, 3])
def test_unrolling(config, unroll):
  params = oracle.random_params(config)
  want = oracle.loss_and_grad(config, Compute(attention="xla", unroll_layers=1))(params, TOKENS)
  same(oracle.loss_and_grad(config, Compute(attention="xla", unroll_layers=unroll))(params, TOKENS), want)


def test_16_bits_are_not_widened_in_the_loop():
  """On CPUs, where an update of a slice in 16 bits may become one in 32 of the whole stack of kept activations."""
  compute = Compute(attention="xla", dtype="bfloat16")
  text = lowered_gradient(dataclasses.replace(C, num_layers=12), compute).compile().as_text()
  assert not re.findall(r"= f32\[12,2,12,\d+\]\S* convert\(", text)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_that_are_no_multiple_of_the_pattern(layers):
  """Against the same kinds written out layer by layer, as one repetition of a pattern."""
  config = dataclasses.replace(PATTERN, num_layers=layers)
  kinds = tuple(config.layer_pattern[i % 2] for i in range(layers))
  written_out = dataclasses.replace(config, layer_pattern=kinds)
  params = oracle.random_params(config)
  want = oracle.forward(written_out)(params, TOKENS)
  same(oracle.forward(config)(params, TOKENS), want)
  logits, cache = oracle.cached_step(config)(params, TOKENS, init_cache(config, 2, 12))
  same(logits, want, 1e-5)  # a cached step adds up in another order
  assert all(np.asarray(cache.layers[i].key).any() for i in range(layers))


REMAT = {
  "full": dict(remat="full"),
  "dots": dict(remat="dots"),
  "names": dict(remat="names", remat_names=("attention", "mlp_up")),
}


@pytest.mark.parametrize("config", [C, PATTERN], ids=["plain", "pattern"])
@pytest.mark.parametrize("name", REMAT)
def test_remat_changes_no_number(name, config):
  params = oracle.random_params(config)
  want = oracle.loss_and_grad(config)(params, TOKENS)
  compute = Compute(attention="xla", unroll_layers=1, **REMAT[name])
  same(oracle.loss_and_grad(config, compute)(params, TOKENS), want)


@pytest.mark.parametrize("unroll", [1, 5])
def test_remat_computes_again(unroll):
  """In a loop and in straight code: the more is dropped, the more is computed again."""

  def flops(**remat):
    compiled = lowered_gradient(C, Compute(attention="xla", unroll_layers=unroll, **remat)).compile()
    return compiled.cost_analysis()["flops"]

  none, names, full = flops(), flops(**REMAT["names"]), flops(**REMAT["full"])
  assert none * 1.05 < names < full
  assert none * 1.2 < full  # a third more, less embedding and head


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_offload_lowers_for_accelerators(platform):
  text = lowered_gradient(C, Compute(attention="xla", remat="offload"), lowering_platforms=(platform,)).as_text()
  assert "pinned_host" in text


def test_program_does_not_grow_with_depth():
  """48 layers compile to the program of 12: one layer in a loop."""

  def size(layers):
    lowered = lowered_gradient(dataclasses.replace(C, num_layers=layers), Compute(attention="xla"))
    return len(lowered.as_text().splitlines()), len(lowered.compile().as_text().splitlines())

  for deep, shallow in zip(size(48), size(12), strict=True):
    assert deep < 1.05 * shallow


def test_init_is_the_same_for_every_device_layout_and_depends_on_the_key():
  a, b = init_params(C, jax.random.key(0)), init_params(C, jax.random.key(1))
  weight = a["blocks"]["mlp"]["up"]["weight"]
  assert not np.allclose(weight, b["blocks"]["mlp"]["up"]["weight"])
  assert not np.allclose(weight[0], weight[1])  # layers differ
  assert weight.dtype == jnp.float32


@pytest.mark.parametrize(
  "scheme, matrix, residual, embedding",
  [
    ("normal", 0.02, 0.02, 0.02),
    ("gpt2", 0.02, 0.02 / (2 * 4) ** 0.5, 0.02),
    ("fan_in", 128**-0.5, 512**-0.5, 128**-0.5),
    ("small", (2 / (5 * 128)) ** 0.5, 2 / (4 * 128**0.5), (2 / (5 * 128)) ** 0.5),
  ],
)
def test_initial_standard_deviations(scheme, matrix, residual, embedding):
  c = ModelConfig(vocab_size=300, embed_dim=128, num_layers=4, num_heads=2, mlp="gelu", init=scheme)
  params = init_params(c, jax.random.key(0))
  assert np.std(params["blocks"]["mlp"]["up"]["weight"]) == pytest.approx(matrix, rel=0.02)
  assert np.std(params["blocks"]["mlp"]["down"]["weight"]) == pytest.approx(residual, rel=0.02)
  assert np.std(params["embedding"]["tokens"]) == pytest.approx(embedding, rel=0.02)
