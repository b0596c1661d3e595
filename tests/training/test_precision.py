"""Dynamic loss scaling against its rule written out in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.training.precision import LossScale


@pytest.mark.parametrize("seed", range(3))
def test_loss_scale_follows_the_rule(seed):
  events = np.random.default_rng(seed).choice(["applied", "overflow", "bad"], 200, p=[0.8, 0.15, 0.05])
  state, scale, good = LossScale.create(8.0), 8.0, 0
  update = jax.jit(LossScale.update, static_argnums=3)
  for event in events:
    state = update(state, jnp.bool_(event == "overflow"), jnp.bool_(event == "applied"), 4)
    if event == "overflow":
      scale, good = max(scale / 2, 1.0), 0
    elif event == "applied":
      good += 1
      if good == 4:
        scale, good = scale * 2, 0
    assert (float(state.scale), int(state.good_steps)) == (scale, good)


def test_loss_scale_has_a_floor_of_one():
  state = LossScale.create(4.0)
  scales = []
  for _ in range(4):
    state = state.update(jnp.bool_(True), jnp.bool_(False), 10)
    scales.append(float(state.scale))
  assert scales == [2.0, 1.0, 1.0, 1.0]
