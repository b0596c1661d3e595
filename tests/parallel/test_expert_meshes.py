"""Experts over the mesh: loss, metrics and gradients are those of one device."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxllm.base.errors import ConfigError
from jaxllm.models.build import check_model_on_mesh, declare, init_params
from jaxllm.models.config import Compute, MLAConfig, ModelConfig, MoEConfig
from jaxllm.objectives.causal_lm import CausalLM
from jaxllm.parallel.config import AxisRules, MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.sharding import activation_sharding, batch_sharding, param_shardings

sys.path.append(str(Path(__file__).parents[1] / "models"))
from oracle import jit, random_params

RULES = AxisRules()
MOE = MoEConfig(num_experts=8, top_k=2, mlp_dim=8, shared_mlp_dim=8, first_dense_layers=1)
C = ModelConfig(vocab_size=40, embed_dim=16, num_layers=3, num_heads=4, mlp_dim=16, max_seq_len=16, moe=MOE)
CONFIGS = {
  "dropless": C,
  "capacity": dataclasses.replace(C, moe=dataclasses.replace(MOE, capacity_factor=1.0)),
  "biases": dataclasses.replace(
    C, mlp="swiglu_clamped", attention_sinks=True, moe=MoEConfig(num_experts=8, top_k=2, mlp_dim=8, bias=True)
  ),
  "latent": ModelConfig(
    vocab_size=40, embed_dim=16, num_layers=2, num_heads=4, mlp_dim=16, max_seq_len=16,
    mla=MLAConfig(kv_lora_rank=8, nope_head_dim=4, rope_head_dim=4, value_head_dim=6),
    moe=MoEConfig(num_experts=8, top_k=2, scoring="sigmoid", correction_bias=True, num_groups=4, top_groups=2),
  ),
}  # fmt: skip
BATCH = {
  "inputs": np.random.default_rng(0).integers(0, 40, (8, 16)),
  "targets": np.random.default_rng(1).integers(0, 40, (8, 16)),
  "segment_ids": np.repeat([[1] * 9 + [2] * 5 + [0] * 2], 8, axis=0),
  "loss_weights": np.repeat([[1.0] * 14 + [0.0] * 2], 8, axis=0).astype(np.float32),
}


def gradient(config, mesh=None):
  graph, shapes, axes = declare(config, Compute(attention="xla", cross_entropy="xla", unroll_layers=1))

  def loss(params, batch):
    total, weight, metrics = CausalLM()({"policy": nnx.merge(graph, params)}, batch)
    return total / weight, metrics

  if mesh is None:
    return jit(jax.value_and_grad(loss, has_aux=True))
  shardings = param_shardings(shapes, axes, mesh, RULES)

  def on_mesh(params, batch):
    with activation_sharding(mesh, RULES):
      return jax.value_and_grad(loss, has_aux=True)(params, batch)

  rows = {name: batch_sharding(mesh, RULES) for name in BATCH}
  return jit(on_mesh, in_shardings=(shardings, rows), out_shardings=(None, shardings))


@functools.cache
def single_device(name):
  params = random_params(CONFIGS[name])
  return params, gradient(CONFIGS[name])(params, BATCH)


@pytest.mark.parametrize(
  "name, sizes",
  [
    ("dropless", dict(data=1, expert=8)),
    ("dropless", dict(fsdp=2, expert=2, tensor=2)),
    ("dropless", dict(data=2, context=2, expert=2)),
    ("dropless", dict(data=4, fsdp=2)),
    ("capacity", dict(data=1, expert=8)),
    ("capacity", dict(fsdp=2, expert=2, tensor=2)),
    ("latent", dict(data=2, expert=2, tensor=2)),
    ("biases", dict(fsdp=2, expert=2, tensor=2)),
  ],
)
def test_one_devices_numbers(name, sizes):
  config, mesh = CONFIGS[name], make_mesh(MeshConfig(**({"data": 1} | sizes)))
  params, ((want_loss, want_metrics), want_gradients) = single_device(name)
  params = jax.device_put(params, param_shardings(*declare(config)[1:], mesh, RULES))
  weight = params["blocks"]["moe"]["up"]["weight"]  # [L, E, D, F]
  assert weight.sharding.shard_shape(weight.shape)[1] == 8 // mesh.shape["expert"]
  (loss, metrics), gradients = gradient(config, mesh)(params, jax.device_put(BATCH, batch_sharding(mesh, RULES)))
  np.testing.assert_allclose(loss, want_loss, rtol=1e-6)  # float32 sums in another order
  for metric in ("moe/load_balance", "moe/z", "moe/dropped"):
    np.testing.assert_allclose(metrics[metric][0], want_metrics[metric][0], rtol=1e-5)
  assert (want_metrics["moe/dropped"][0] > 1) == (name == "capacity")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6), gradients, want_gradients)


def test_experts_that_do_not_divide():
  config = dataclasses.replace(C, moe=dataclasses.replace(MOE, num_experts=6))
  mesh = make_mesh(MeshConfig(data=2, expert=4))
  with pytest.raises(ConfigError, match=r"model\.moe\.num_experts 6 is not divisible by mesh\.expert = 4"):
    check_model_on_mesh(config, mesh)
  with pytest.raises(ConfigError, match=r"model\.moe\.num_experts 6"):
    init_params(config, jax.random.key(0), mesh)
