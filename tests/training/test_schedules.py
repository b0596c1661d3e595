"""Schedules against their closed forms in float64."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxllm.training.config import OptimizerConfig
from jaxllm.training.schedules import make_schedule

PEAK, FINAL, WARMUP, TOTAL = 3e-3, 0.1, 10, 101
CONFIG = OptimizerConfig(learning_rate=PEAK, final_lr_fraction=FINAL, warmup_steps=WARMUP, decay_fraction=0.3)


def values(total=TOTAL, upto=None, **changes):
  schedule = make_schedule(dataclasses.replace(CONFIG, **changes), total)
  return np.asarray(jax.vmap(schedule)(np.arange(upto or total, dtype=np.int32)), np.float64)


def after_warmup(name, s):
  p = (s - WARMUP) / (TOTAL - 1 - WARMUP)
  if name == "cosine":
    return FINAL + (1 - FINAL) * (1 + np.cos(np.pi * p)) / 2
  if name == "linear":
    return FINAL + (1 - FINAL) * (1 - p)
  if name == "wsd":  # 30 of 101 steps decay: the last one at the peak is step 70
    return FINAL + (1 - FINAL) * (1 - np.sqrt(np.clip((s - 70) / 30, 0, 1)))
  return np.sqrt((WARMUP + 1) / (s + 1)) if name == "rsqrt" else np.ones_like(s)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "rsqrt", "constant"])
def test_closed_form(name):
  s = np.arange(TOTAL, dtype=np.float64)
  expected = PEAK * np.where(s < WARMUP, (s + 1) / (WARMUP + 1), after_warmup(name, s))
  np.testing.assert_allclose(values(schedule=name), expected, rtol=2e-5)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("total", [12, 101, 1000, 12345])
def test_ends_exactly_at_the_final_fraction(name, total):
  lr = values(schedule=name, total=total, upto=total + 5)
  np.testing.assert_allclose(lr[total - 1 :], PEAK * FINAL, rtol=1e-6)
  assert lr[WARMUP] == np.float32(PEAK)  # the peak is reached, once the warm-up is over
  assert lr.argmax() == WARMUP and lr[total - 2] > lr[total - 1]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "rsqrt", "constant"])
def test_a_run_shorter_than_its_warmup_stays_on_the_ramp(name):
  np.testing.assert_allclose(values(schedule=name, total=5), PEAK * np.arange(1, 6) / 11, rtol=1e-6)
  # The peak is the last step: nothing is left to decay in.
  np.testing.assert_allclose(values(schedule=name, total=11)[-1], PEAK, rtol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "rsqrt", "constant"])
def test_a_single_step_takes_the_peak(name):
  np.testing.assert_allclose(values(schedule=name, total=1, warmup_steps=0), [PEAK], rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
  assert values(warmup_steps=0)[0] == np.float32(PEAK)


@pytest.mark.parametrize("fraction, constant_steps", [(0.0, TOTAL), (1.0, WARMUP + 1)])
def test_wsd_decays_never_or_always(fraction, constant_steps):
  lr = values(schedule="wsd", decay_fraction=fraction)
  at_peak = (lr == np.float32(PEAK)).sum()
  assert at_peak == constant_steps - WARMUP
