"""The train step: token weighting, accumulation, sharding, precision, guards, averages, resume."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toy_model import D, toy_batch, toy_loss, toy_params

from jaxllm.models.config import Compute
from jaxllm.training.config import OptimizerConfig, TrainingConfig
from jaxllm.training.optimizer import make_optimizer, state_shardings
from jaxllm.training.schedules import make_schedule
from jaxllm.training.state import SPIKE_DECAY, SPIKE_WARMUP, init_state
from jaxllm.training.step import make_train_step, split_batch

TOTAL = 20
PLAIN = OptimizerConfig(  # p <- p - 0.1 * gradient
  name="sgd", learning_rate=0.1, schedule="constant", warmup_steps=0, b1=0.0, weight_decay=0.0, clip_norm=None
)
ADAMW = OptimizerConfig(learning_rate=0.01, warmup_steps=3)


@functools.cache
def compiled_step(*args):
  """One compilation for all tests with these settings."""
  return jax.jit(build(*args)[0])


def build(training=TrainingConfig(), optimizer_config=ADAMW, params=None, loss=toy_loss, compute=Compute()):
  params = toy_params() if params is None else params
  optimizer = make_optimizer(optimizer_config, TOTAL, params)
  schedule = make_schedule(optimizer_config, TOTAL)
  step = make_train_step(loss, optimizer, schedule, training, compute, optimizer_config)
  return step, init_state(params, optimizer, training, compute, optimizer_config)


def run(batches, training=TrainingConfig(), optimizer_config=ADAMW, params=None, loss=toy_loss, compute=Compute()):
  step, state = build(training, optimizer_config, params, loss, compute)
  shared = params is None and loss is toy_loss and compute == Compute()
  step = compiled_step(training, optimizer_config) if shared else jax.jit(step)
  history = []
  for batch in batches:
    state, metrics = step(state, batch)
    history.append({name: float(value) for name, value in metrics.items()})
  return state, history


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, **tolerance):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def mean_gradient(params, batch):
  @jax.value_and_grad
  def mean(params):
    loss, weight, _ = toy_loss(params, batch, None)
    return loss / weight

  return jax.jit(mean)(params)


def poisoned(batch):
  return batch | {"loss_weights": batch["loss_weights"].at[0, 0].set(jnp.nan)}


# What a step computes


def test_a_step_descends_the_weighted_mean():
  params, batch = toy_params(), toy_batch()
  state, (metrics,) = run([batch], optimizer_config=PLAIN)
  loss, grads = mean_gradient(params, batch)
  assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), rtol=1e-5, atol=1e-6)
  norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose([metrics["loss"], metrics["grad_norm"]], [loss, norm], rtol=1e-5)
  np.testing.assert_allclose(metrics["param_norm"], optax.global_norm(state.params), rtol=1e-6)
  np.testing.assert_allclose(metrics["loss_weight"], batch["loss_weights"].sum(), rtol=1e-6)
  assert int(state.step) == 1 and metrics["skipped"] == 0 and not metrics["halted"]


@pytest.mark.parametrize("clip, factor", [(2.6, 0.2), (14.0, 1.0), (None, 1.0)])
def test_clipping_is_by_the_global_norm(clip, factor):
  def loss(params, batch, key):  # a sum of losses with gradients 6, 8 and 24, of norm 26 = 2 * 13
    return 6 * params["a"].sum() + (params["b"] * batch).sum(), jnp.float32(2), {}

  params, batch = {"a": jnp.zeros(1), "b": jnp.zeros(2)}, jnp.array([[8.0, 24.0]])
  config = dataclasses.replace(PLAIN, clip_norm=clip)
  state, (metrics,) = run([batch], TrainingConfig(), config, params, loss)
  np.testing.assert_allclose(state.params["a"], [-0.1 * factor * 3], rtol=1e-5)
  np.testing.assert_allclose(state.params["b"], [-0.1 * factor * 4, -0.1 * factor * 12], rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], 13, rtol=1e-6)  # before clipping


def test_a_batch_without_weight_has_no_gradient():
  state, (metrics,) = run([toy_batch(weights=0.0)], optimizer_config=PLAIN)
  assert_equal(state.params, toy_params())
  assert metrics["loss"] == metrics["grad_norm"] == metrics["accuracy"] == 0
  assert int(state.loss_statistics.count) == 0 and not metrics["halted"]


def test_the_rate_is_the_schedules_at_the_step_skipped_ones_included():
  state, history = run([poisoned(toy_batch())] * 2 + [toy_batch()] * 4, TrainingConfig(on_bad_step="skip"))
  assert int(optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")[0][1]) == 4
  schedule = make_schedule(ADAMW, TOTAL)
  rates = [m["learning_rate"] for m in history]
  np.testing.assert_allclose(rates, [schedule(i) for i in range(6)], rtol=1e-6)


def test_the_key_differs_by_step_and_micro_batch_but_not_by_run():
  def loss(params, batch, key):
    noise = jax.random.normal(key, ())
    return noise + 0 * params["w"].sum(), jnp.float32(1), {"square": noise**2}

  training = TrainingConfig(batch_size=4, accumulation=2)
  params = {"w": jnp.ones(2)}
  first, second = (run([jnp.ones((4, 1))] * 3, training, PLAIN, params, loss)[1] for _ in range(2))
  assert first == second
  assert len({m["loss"] for m in first}) == 3
  # Equal noise n in both micro-batches would give mean n, and squares that sum to 2 n^2.
  assert all(abs(m["square"] - 2 * m["loss"] ** 2) > 1e-3 for m in first)


# Accumulation and sharding


@pytest.mark.parametrize("k", [4, 16])
def test_accumulation_does_not_change_the_result(k):
  batches = [toy_batch(seed=i) for i in range(3)]
  sums = [split_batch(b, k)["loss_weights"].sum((1, 2)) for b in batches]
  assert all(np.ptp(s) > 0.5 for s in sums)  # the micro-batches do weigh differently
  whole, whole_metrics = run(batches, optimizer_config=PLAIN)
  parts, parts_metrics = run(batches, TrainingConfig(batch_size=16, accumulation=k), PLAIN)
  assert_close(parts.params, whole.params, rtol=1e-5, atol=1e-6)
  assert_close(parts_metrics, whole_metrics, rtol=1e-5)


def test_only_accumulation_scans():
  def loss(params, batch, key):
    return (batch @ params["w"]).sum(), jnp.float32(1), {}

  for k in (1, 2):
    step, state = build(TrainingConfig(accumulation=k), PLAIN, {"w": jnp.ones((3, 2))}, loss)
    assert ("scan[" in str(jax.make_jaxpr(step)(state, jnp.ones((8, 3))))) == (k > 1)


def test_split_batch_deals_rows_out_and_moves_nothing_between_devices():
  np.testing.assert_array_equal(split_batch(jnp.arange(6), 3), [[0, 3], [1, 4], [2, 5]])
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows, dealt = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "data"))
  deal = jax.jit(lambda x: split_batch(x, 4), in_shardings=rows, out_shardings=dealt)
  text = deal.lower(jnp.ones((32, 6))).compile().as_text()
  assert not re.search("all-to-all|all-gather|collective-permute|all-reduce", text)


@pytest.mark.parametrize("name, k", [("adafactor", 1), ("muon", 2)])
def test_eight_devices_equal_one(name, k):
  training = TrainingConfig(batch_size=16, accumulation=k, ema_decay=0.9)
  config = dataclasses.replace(ADAMW, name=name)
  batches = [toy_batch(seed=i) for i in range(3)]
  expected, expected_metrics = run(batches, training, config)

  mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def spec(leaf):
    axis = next((i for i in reversed(range(leaf.ndim)) if leaf.shape[i] % D == 0), None)
    return NamedSharding(mesh, P() if axis is None else P(*[None] * axis, "fsdp"))

  step, state = build(training, config)
  params_shardings = jax.tree.map(spec, state.params)
  shardings = state_shardings(jax.eval_shape(lambda: state), state.params, params_shardings)
  assert shardings.params == shardings.ema == params_shardings
  rows = NamedSharding(mesh, P(("data", "fsdp")))
  step = jax.jit(step, in_shardings=(shardings, rows), out_shardings=(shardings, None), donate_argnums=0)
  state = jax.device_put(state, shardings)
  for batch, wanted in zip(batches, expected_metrics, strict=True):
    state, metrics = step(state, jax.device_put(batch, rows))
    assert_close(metrics, wanted, rtol=1e-4)
  assert_close(state.params, expected.params, rtol=1e-3, atol=3e-5)
  assert_close(state.ema, expected.ema, rtol=1e-3, atol=3e-5)


# Precision


@pytest.mark.parametrize("reduce_dtype", ["float32", "low"])
@pytest.mark.parametrize("dtype, k", [("bfloat16", 1), ("float16", 4)])
def test_low_precision_computes_low_and_keeps_float32(dtype, k, reduce_dtype):
  reduce_dtype = dtype if reduce_dtype == "low" else reduce_dtype
  seen = set()

  def loss(params, batch, key):
    seen.update(leaf.dtype.name for leaf in jax.tree.leaves(params))
    return toy_loss(jax.tree.map(lambda p: p.astype(dtype), params), batch, key)

  batch = toy_batch()
  training = TrainingConfig(batch_size=16, accumulation=k)
  compute = Compute(dtype=dtype, reduce_dtype=reduce_dtype)
  config = dataclasses.replace(PLAIN, loss_scale=2.0**10)
  state, (metrics,) = run([batch], training, config, loss=loss, compute=compute)
  assert seen == {reduce_dtype}
  assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
  exact, (exact_metrics,) = run([batch], optimizer_config=PLAIN)
  np.testing.assert_allclose(metrics["loss"], exact_metrics["loss"], rtol=2e-2)
  np.testing.assert_allclose(metrics["grad_norm"], exact_metrics["grad_norm"], rtol=2e-2)
  step = jax.tree.map(jnp.subtract, state.params, exact.params)
  assert optax.global_norm(step) < 0.05 * 0.1 * exact_metrics["grad_norm"]


HALF = Compute(dtype="float16", reduce_dtype="float16")


def overflowing_loss(params, batch, key):
  """The gradient that float16 must hold is 8 * scale / 4 positions: infinite from a scale of 2^15 on."""
  return (params["w"].astype(jnp.float16) * 8).sum().astype(jnp.float32) * batch.mean(), jnp.float32(1), {}


@pytest.mark.parametrize("reduce_dtype", ["float32", "float16"])
def test_float16_overflow_halves_the_scale_skips_and_is_not_bad(reduce_dtype):
  config = dataclasses.replace(PLAIN, loss_scale=2.0**16, loss_scale_growth_steps=3)
  training, compute = TrainingConfig(on_bad_step="stop"), Compute(dtype="float16", reduce_dtype=reduce_dtype)
  state, history = run([jnp.ones((4, 1))] * 9, training, config, {"w": jnp.zeros(2)}, overflowing_loss, compute)
  # Two overflows, three good steps, growth, an overflow, three good steps (and growth once more).
  assert [np.log2(m["loss_scale"]) for m in history] == [16, 15, 14, 14, 14, 15, 14, 14, 14]
  assert [m["skipped"] for m in history] == [1, 2, 2, 2, 2, 3, 3, 3, 3]
  np.testing.assert_allclose(state.params["w"], -0.1 * 8 * 6, rtol=1e-6)
  assert int(state.step) == 9 and not state.halted
  assert int(state.loss_statistics.count) == 6
  assert float(state.loss_scale.scale) == 2.0**15


def test_float16_overflow_at_scale_one_is_bad():
  config = dataclasses.replace(PLAIN, loss_scale=2.0)
  loss = lambda params, batch, key: (  # noqa: E731
    1e5 * (params["w"].astype(jnp.float16).astype(jnp.float32) * batch).sum(), jnp.float32(1), {}
  )  # fmt: skip
  training = TrainingConfig(on_bad_step="stop")
  state, history = run([jnp.full((1, 1), 8.0)] * 3, training, config, {"w": jnp.zeros(1)}, loss, HALF)
  assert [m["halted"] for m in history] == [0, 1, 1]
  assert int(state.step) == 1 and float(state.loss_scale.scale) == 1


# Bad steps


def test_skip_equals_a_run_that_never_saw_the_bad_batch():
  good = [toy_batch(seed=i) for i in range(5)]
  config = dataclasses.replace(ADAMW, schedule="constant", warmup_steps=0)
  training = TrainingConfig(on_bad_step="skip", ema_decay=0.9)
  state, history = run(good[:2] + [poisoned(good[0])] + good[2:], training, config)
  expected, _ = run(good, training, config)
  assert_equal(dataclasses.replace(state, step=expected.step, skipped=expected.skipped), expected)
  assert [m["skipped"] for m in history] == [0, 0, 1, 1, 1, 1]
  assert int(state.step) == 6 and int(expected.step) == 5 and not state.halted


def test_stop_keeps_the_last_good_state_for_ever():
  good = [toy_batch(seed=i) for i in range(3)]
  training = TrainingConfig(on_bad_step="stop", ema_decay=0.9, spike_sigmas=4.0)
  state, history = run(good[:2] + [poisoned(good[2])] + good, training)
  last_good, _ = run(good[:2], training)
  assert [m["halted"] for m in history] == [0, 0, 1, 1, 1, 1]
  assert_equal(dataclasses.replace(state, halted=last_good.halted), last_good)
  assert int(state.step) == 2 and history[-1]["skipped"] == 0


def level_loss(params, batch, key):
  return batch.sum() + params["w"].sum(), jnp.float32(batch.size), {}


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_spikes_against_the_weighted_mean_and_deviation(action):
  levels = 3 + np.random.default_rng(0).normal(size=SPIKE_WARMUP + 20)
  weights = SPIKE_DECAY ** np.arange(len(levels))[::-1]
  mean = np.average(levels, weights=weights)
  deviation = np.sqrt(np.average((levels - mean) ** 2, weights=weights))
  training = TrainingConfig(spike_sigmas=5.0, on_bad_step=action)
  params = {"w": jnp.zeros(1)}
  step, state = build(training, dataclasses.replace(PLAIN, learning_rate=0.0), params, level_loss)
  step = jax.jit(step)
  for level in levels:
    state, metrics = step(state, jnp.full((1, 1), level, jnp.float32))
  np.testing.assert_allclose(state.loss_statistics.mean, mean, rtol=1e-5)
  np.testing.assert_allclose(state.loss_statistics.variance, deviation**2, rtol=1e-4)
  assert not metrics["halted"] and metrics["skipped"] == 0

  for sigmas, spikes in ((4.9, False), (5.1, True), (-50.0, False)):
    after, metrics = step(state, jnp.full((1, 1), mean + sigmas * deviation, jnp.float32))
    assert (metrics["skipped"] == 1) == (spikes and action == "skip")
    assert metrics["halted"] == (spikes and action == "stop")
    assert (int(after.loss_statistics.count) == len(levels)) == spikes  # a bad loss is no statistic


def test_no_spike_before_the_statistics_are_warm():
  training = TrainingConfig(spike_sigmas=3.0)
  batches = [jnp.full((1, 1), 1.0 + 0.01 * (i % 2)) for i in range(SPIKE_WARMUP)]
  batches[-1] = jnp.full((1, 1), 100.0)
  config = dataclasses.replace(PLAIN, learning_rate=0.0)
  _, history = run(batches, training, config, {"w": jnp.zeros(1)}, level_loss)
  assert not history[-1]["halted"]


# Averages, resume, memory


def test_ema_is_its_closed_form():
  def loss(params, batch, key):
    return jnp.square(params["w"] - batch).sum(), jnp.float32(1), {}

  decay = 0.8
  step, state = build(TrainingConfig(ema_decay=decay), params={"w": jnp.ones((4, 2))}, loss=loss)
  step = jax.jit(step)
  visited = [state.params]
  for level in range(5):
    state, _ = step(state, jnp.full((4, 2), level, jnp.float32))
    visited.append(state.params)
  weights = [decay**5] + [(1 - decay) * decay ** (4 - i) for i in range(5)]
  average = lambda *leaves: sum(w * np.asarray(p, np.float64) for w, p in zip(weights, leaves))  # noqa: E731
  assert_close(state.ema, jax.tree.map(average, *visited), rtol=1e-5, atol=1e-6)


def test_resume_is_bit_identical():
  training = TrainingConfig(batch_size=16, accumulation=2, ema_decay=0.9, spike_sigmas=6.0, on_bad_step="skip")
  config = dataclasses.replace(ADAMW, name="muon", loss_scale=2.0**8, loss_scale_growth_steps=2)
  batches = [toy_batch(seed=i) for i in range(6)]
  batches[1] = poisoned(batches[1])

  make = functools.partial(build, training, config, compute=HALF)
  step = jax.jit(make()[0], donate_argnums=0)

  def continue_from(state, batches):
    history = []  # read at the end: donating the state must not take the metrics along
    for batch in batches:
      state, metrics = step(state, batch)
      history.append(metrics)
    return jax.tree.map(np.asarray, (state, history))

  whole = continue_from(make()[1], batches)
  half, first = continue_from(make()[1], batches[:3])
  resumed, second = continue_from(jax.tree.map(jnp.asarray, half), batches[3:])
  assert_equal((resumed, first + second), whole)
  assert int(whole[0].step) == 6 and int(whole[0].skipped) == 1


@pytest.mark.parametrize("name, slots", [("adamw", 2), ("sgd", 1)])
def test_the_donated_state_is_overwritten(name, slots):
  def loss(params, batch, key):
    return jnp.square(batch @ params["w"]).sum(), jnp.float32(1), {}

  config = dataclasses.replace(ADAMW, name=name)
  step, state = build(TrainingConfig(ema_decay=0.9), config, {"w": jnp.ones((64, 96))}, loss)
  compiled = jax.jit(step, donate_argnums=0).lower(state, jnp.ones((8, 64))).compile()
  # Weights, average and moments.
  assert compiled.memory_analysis().alias_size_in_bytes >= 4 * 64 * 96 * (2 + slots)
