"""Experts: capacity, the router's losses, and what the objective makes of them. (Routing itself is compared
with transformers' in the families' tests.)"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from jaxllm.base.errors import ConfigError
from jaxllm.models.build import declare, unstack_layers
from jaxllm.models.caches import init_cache
from jaxllm.models.config import Compute, MLAConfig, ModelConfig, MoEConfig
from jaxllm.models.moe import dropless, route, router_losses, with_capacity
from jaxllm.objectives.causal_lm import CausalLM
from jaxllm.training.flops import matmul_parameters

MOE = MoEConfig(num_experts=4, top_k=2, mlp_dim=24, first_dense_layers=1, every=2, shared_mlp_dim=8)
C = ModelConfig(vocab_size=31, embed_dim=16, num_layers=5, num_heads=2, mlp_dim=32, max_seq_len=32, moe=MOE)
B, T = 2, 12
TOKENS = np.random.default_rng(0).integers(0, 31, (B, T))


def with_moe(**changes):
  return dataclasses.replace(C, moe=dataclasses.replace(MOE, **changes))


@functools.cache
def params():
  return oracle.random_params(C)


def test_layers():
  assert C.moe_layers == (1, 3) and C.layers_with("mlp") == (0, 2, 4)
  assert C.layer_runs == ((0, 1, 1), (1, 5, 2))
  shapes = declare(C)[1]["blocks"]
  assert shapes["moe"]["up"]["weight"].shape == (2, 4, 16, 24)
  assert shapes["mlp"]["up"]["weight"].shape == (3, 16, 32)
  assert shapes["attention"]["query"]["weight"].shape == (5, 16, 16)


def test_a_cache_and_layers_kept_apart_change_nothing():
  want = oracle.forward(C)(params(), TOKENS)
  assert np.std(want) > 0.3
  np.testing.assert_allclose(oracle.forward(C)(unstack_layers(params()), TOKENS), want, rtol=0, atol=1e-5)
  cached, _ = oracle.cached_step(C)(params(), TOKENS, init_cache(C, B, T))
  np.testing.assert_allclose(cached, want, rtol=0, atol=1e-5)


def test_enough_capacity_is_dropless():
  """An expert that may take every token of a sequence drops none: same logits, loss and gradients."""
  loss, gradients = oracle.loss_and_grad(C)(params(), TOKENS)
  got, got_gradients = oracle.loss_and_grad(with_moe(capacity_factor=2.0))(params(), TOKENS)  # 2 T k / E = T
  assert abs(float(got) - float(loss)) < 1e-6
  leaves = jax.tree.leaves(gradients["blocks"]["moe"])
  assert all(np.isfinite(g).all() and np.abs(g).max() > 1e-6 for g in leaves)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), got_gradients, gradients)


def feed(multiply, x, matrices):
  return multiply(x, matrices[1], embed=1)


def test_capacity_by_hand():
  """One expert a token: two experts with room for two of six tokens each; what is dropped gets zeros."""
  x = jnp.arange(1.0, 7.0).reshape(1, 6, 1)
  experts = jnp.array([[0, 0, 1, 0, 0, 1]])[..., None]
  weights = jnp.full((1, 6, 1), 0.5)
  matrices = (None, jnp.array([[[10.0]], [[100.0]]]), None)
  run = functools.partial(with_capacity, feed, x, weights, experts, matrices=matrices, factor=2 / 3)
  y, dropped = run(real=jnp.ones((1, 6), bool))
  assert y[0, :, 0].tolist() == [5, 10, 150, 0, 0, 300]
  assert float(dropped) == pytest.approx(2 / 6)
  y, dropped = run(real=jnp.array([[False, True, True, True, True, True]]))  # padding takes no room
  assert y[0, :, 0].tolist() == [0, 10, 150, 20, 0, 300]
  assert float(dropped) == pytest.approx(1 / 5)
  assert dropless(feed, x, weights, experts, matrices)[0, :, 0].tolist() == [5, 10, 150, 20, 25, 300]


def test_what_is_dropped_depends_on_earlier_tokens_only():
  run = oracle.forward(with_moe(capacity_factor=0.6))
  other = TOKENS.copy()
  other[:, 8:] = (other[:, 8:] + 5) % 31
  a, b = run(params(), TOKENS), run(params(), other)
  np.testing.assert_allclose(a[:, :8], b[:, :8], rtol=0, atol=1e-5)
  assert np.abs(a[:, 8:] - b[:, 8:]).max() > 0.1
  assert np.abs(a - oracle.forward(C)(params(), TOKENS)).max() > 0.1  # something was dropped


def test_router_losses_by_hand():
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((2, 5, 4)) * 2
  real = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], bool)
  weights, experts, scores = route(MoEConfig(num_experts=4, top_k=2), jnp.asarray(logits, jnp.float32))
  got = router_losses(jnp.asarray(logits, jnp.float32), scores, experts, jnp.asarray(real))
  sent, share, z = np.zeros(4), np.zeros(4), 0.0
  for row in logits[real]:
    p = np.exp(row) / np.exp(row).sum()
    best = np.argsort(-p)[:2]
    sent[best] += 1 / 6
    share += p / 6
    z += math.log(np.exp(row).sum()) ** 2 / 6
  assert float(got["load_balance"]) == pytest.approx(4 * (sent * share).sum(), rel=1e-5)
  assert float(got["z"]) == pytest.approx(z, rel=1e-5)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_router_losses_at_their_ends():
  """Balanced routers lose k, and one that sends all tokens to the same k experts loses E."""
  m = MoEConfig(num_experts=4, top_k=2)

  def load_balance(logits):
    _, experts, scores = route(m, logits)
    return float(router_losses(logits, scores, experts, jnp.ones(logits.shape[:2], bool))["load_balance"])

  pairs = jnp.array([[50.0, 50, 0, 0], [0, 0, 50, 50]] * 3)[None]
  assert load_balance(pairs) == pytest.approx(2, rel=1e-5)
  assert load_balance(jnp.tile(jnp.array([50.0, 50, 0, 0]), (1, 6, 1))) == pytest.approx(4, rel=1e-5)


def test_load_balance_is_transformers():
  pytest.importorskip("torch")
  import torch
  from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

  logits = np.random.default_rng(1).standard_normal((2, 7, 5)).astype(np.float32)
  mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
  _, experts, scores = route(MoEConfig(num_experts=5, top_k=2), jnp.asarray(logits))
  got = router_losses(jnp.asarray(logits), scores, experts, jnp.asarray(mask, bool))["load_balance"]
  want = load_balancing_loss_func((torch.tensor(logits.reshape(-1, 5)),), 5, 2, torch.tensor(mask))
  assert float(got) == pytest.approx(want.item(), rel=1e-5)


def test_the_objective_adds_the_routers_losses():
  config = with_moe(load_balance_weight=0.3, z_weight=0.2, capacity_factor=0.6)
  batch = {
    "inputs": TOKENS,
    "targets": np.roll(TOKENS, -1, axis=1),
    "segment_ids": np.repeat([[1] * 9 + [0] * 3], B, axis=0),
    "loss_weights": np.repeat([[1.0] * 8 + [0.0] * 4], B, axis=0).astype(np.float32),
  }

  @functools.partial(oracle.jit)
  def sums(params, batch):
    return CausalLM()({"policy": nnx.merge(declare(config, oracle.XLA)[0], params)}, batch)

  loss, weight, metrics = sums(params(), batch)
  mean = {name: float(total / weight) for name, (total, weight) in metrics.items()}
  assert float(weight) == 16
  extra = 0.3 * mean["moe/load_balance"] + 0.2 * mean["moe/z"]
  assert float(loss / weight) == pytest.approx(mean["nll"] + extra, rel=1e-6)
  assert 1.5 < mean["moe/load_balance"] < 4 and mean["moe/z"] > 0.5 and 0 < mean["moe/dropped"] < 1
  other = batch | {"inputs": np.where(batch["segment_ids"] == 0, 7, TOKENS)}  # padding has no part in it
  assert float(sums(params(), other)[0]) == pytest.approx(float(loss), rel=1e-6)


def test_dense_models_return_no_router_losses():
  config = dataclasses.replace(C, moe=None)
  graph, shapes, _ = declare(config)
  tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
  router = jax.eval_shape(lambda p, t: nnx.merge(graph, p).hidden_and_router(t)[2], shapes, tokens)
  assert router is None


LATENT = MLAConfig(kv_lora_rank=8, q_lora_rank=6, nope_head_dim=6, rope_head_dim=4, value_head_dim=5)


@pytest.mark.parametrize("mla", [None, LATENT, dataclasses.replace(LATENT, q_lora_rank=None)])
def test_weights_that_a_token_meets(mla):
  """Counted from the declared shapes, of experts the share that is chosen."""
  config = dataclasses.replace(C, mla=mla, head_dim=0, tie_embeddings=False)
  met = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(declare(config)[1]):
    names = [k.key for k in path]
    if names[-1] == "weight":
      experts = "moe" in names and leaf.ndim == 4
      met += math.prod(leaf.shape) * (MOE.top_k / MOE.num_experts if experts else 1)
  assert matmul_parameters(config) == met


def test_the_latent_cache_is_small():
  config = dataclasses.replace(C, mla=LATENT, head_dim=0)
  cache = jax.eval_shape(lambda: init_cache(config, 2, 32))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(cache.layers[0])) == 2 * 32 * (8 + 4)


@pytest.mark.parametrize("platform, target", [("cuda", "h100"), ("tpu", "v5p")])
def test_dropless_lowers_for_accelerators(platform, target):
  graph, shapes, _ = declare(C, Compute(target=target, attention="xla", grouped_matmul="xla"))
  tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
  run = jax.jit(lambda p, t: nnx.merge(graph, p)(t)[0].sum())
  text = jax.jit(jax.grad(run)).trace(shapes, tokens).lower(lowering_platforms=(platform,)).as_text()
  assert ("ragged_dot" in text) == (platform == "tpu")  # where XLA has it without copies


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(top_k=5), r"model\.moe\.top_k is 5; it must be between 1 and num_experts 4"),
    (dict(every=0), r"model\.moe\.every is 0"),
    (dict(num_groups=3), r"cannot choose 2 of 4 experts in 1 of 3 groups"),
    (dict(num_groups=4), r"cannot choose 2 of 4 experts in 1 of 4 groups"),
    (dict(capacity_factor=0.0), r"model\.moe\.capacity_factor is 0\.0"),
    (dict(first_dense_layers=5), r"model\.moe leaves no layer with experts"),
  ],
)
def test_impossible_experts(changes, message):
  with pytest.raises(ConfigError, match=message):
    with_moe(**changes)


def test_impossible_latent_attention():
  with pytest.raises(ConfigError, match=r"model\.head_dim is 16, but model\.mla makes heads of 10"):
    ModelConfig(mla=LATENT, head_dim=16)
  with pytest.raises(ConfigError, match=r"model\.mla has as many key as query heads"):
    ModelConfig(mla=LATENT, num_kv_heads=2)
  with pytest.raises(ConfigError, match=r"model\.mla goes with neither"):
    ModelConfig(mla=LATENT, sliding_window=4)
