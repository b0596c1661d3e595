"""The head's loss on backends xla and cpu, against float64 numpy and PyTorch; what every backend promises beside."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from head_loss_oracle import Case, close, temporaries
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import cross_entropy, dispatch, token_log_probs, token_log_probs_and_slopes
from jaxllm.kernels.head_loss.api import TOKENS
from jaxllm.kernels.head_loss.chunks import UNWANTED, Coefficients, Options

TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 1e-2}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
  backend=st.sampled_from(["xla", "cpu"]),
  dtype=st.sampled_from(list(TOLERANCE)),
  size=st.sampled_from([(2, 37, 24, 53), (1, 130, 40, 515), (3, 1, 8, 7)]),
  options=st.fixed_dictionaries(
    dict(
      z_loss=st.sampled_from([0.0, 1e-2]),
      softcap=st.sampled_from([None, 3.0]),
      label_smoothing=st.sampled_from([0.0, 0.1]),
      chunk=st.sampled_from([None, 32]),
    )
  ),
  transposed=st.booleans(),
)
def test_sums_and_gradients(backend, dtype, size, options, transposed):
  case = Case.draw(*size, dtype=dtype, transposed=transposed)
  got = case.sums_and_gradients(backend=backend, **options)
  options.pop("chunk")
  close(got, case.oracle(**options), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["xla", "cpu"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_token_log_probs(backend, softcap):
  case = Case.draw(2, 37, 24, 53, transposed=softcap is None)
  d_logp, d_lse = np.random.default_rng(1).standard_normal((2, 2, 37))
  got = case.log_probs_and_gradients(d_logp, d_lse, backend=backend, softcap=softcap)
  close(got, case.log_probs_oracle(d_logp, d_lse, softcap=softcap), 2e-5)


@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_tokens_without_weight_may_hold_anything(backend):
  case = Case.draw(2, 9, 16, 30)
  case.weights[0, :4] = case.weights[1, 7] = 0
  poisoned = dataclasses.replace(
    case,
    x=jnp.where(case.weights[..., None] == 0, jnp.nan, case.x),
    targets=np.where(case.weights == 0, -100, case.targets),
  )
  options = dict(backend=backend, label_smoothing=0.1)
  want, got = case.sums_and_gradients(**options), poisoned.sums_and_gradients(**options)
  jax.tree.map(np.testing.assert_array_equal, got, want)

  def total(x, head):
    logp, lse = token_log_probs(x, head, jnp.asarray(poisoned.targets), mask=jnp.asarray(case.weights != 0))
    return (logp + lse).sum(), (logp, lse)

  (dx, d_head), (logp, lse) = jax.grad(total, (0, 1), has_aux=True)(poisoned.x, case.head)
  assert all(np.isfinite(a).all() for a in (dx, d_head, logp, lse))
  assert (np.asarray(logp)[case.weights == 0] == 0).all() and (np.asarray(dx)[case.weights == 0] == 0).all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("wanted", [0, 1, 75, 111])
def test_unwanted_tokens_have_no_logits(dtype, wanted):
  """In the C++ kernel. The others' results are the same bits as with all of them, and those of the oracle."""
  case = Case.draw(1, 111, 40, 515, dtype=dtype)
  call = dispatch.Call(TOKENS, "cpu", "cpu", Options(of_head=True))
  keep = np.zeros(111, bool)
  keep[np.random.default_rng(2).permutation(111)[:wanted]] = True
  x, targets = case.x[0], case.targets[0]
  marked = jnp.asarray(np.where(keep, targets, UNWANTED))
  coefficients = Coefficients(*(jnp.where(keep, value, 0.0) for value in (1.5, 0.01, 2.0, 0.001)))
  forward, backward = (jax.jit(lambda *a, f=f: f(call, *a)) for f in (call.module.forward, call.module.backward))
  stats, dx, d_head = backward(x, case.head, marked, coefficients)
  full, full_dx, full_head = backward(x, case.head, jnp.asarray(targets), coefficients)
  for got, want in zip((*stats, *forward(x, case.head, marked), dx), (*full, *full, full_dx), strict=True):
    assert not np.asarray(got)[~keep].any()
    np.testing.assert_array_equal(np.asarray(got)[keep], np.asarray(want)[keep])
  close(d_head, full_head, 1e-6)
  lse, logits = np.asarray(stats.lse)[keep], case.logits(None)[2][keep]
  np.testing.assert_allclose(lse, np.log(np.exp(logits).sum(-1)), rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["xla", "cpu"])
@pytest.mark.parametrize("dtype, softcap", [(jnp.float32, None), (jnp.float32, 3.0), (jnp.bfloat16, None)])
def test_slopes_of_log_probs(backend, dtype, softcap):
  case = Case.draw(2, 37, 24, 53, dtype=dtype)
  mask = case.weights != 0
  options = dict(mask=jnp.asarray(mask), softcap=softcap, backend=backend)
  logp, lse, slopes = token_log_probs_and_slopes(case.x, case.head, jnp.asarray(case.targets), **options)
  want = case.log_probs_oracle(mask, np.zeros_like(mask), softcap=softcap)
  close((logp, lse), (want[0] * mask, want[1] * mask), TOLERANCE[dtype])
  close(slopes, want[2], TOLERANCE[dtype])
  assert slopes.dtype == dtype


@pytest.mark.parametrize("head_dtype", [jnp.float32, jnp.bfloat16])
def test_head_of_another_dtype(head_dtype):
  x_dtype = jnp.bfloat16 if head_dtype == jnp.float32 else jnp.float32
  case = Case.draw(1, 100, 24, 53, dtype=x_dtype, head_dtype=head_dtype)
  for backend in ("xla", "cpu"):
    close(case.sums_and_gradients(backend=backend, chunk=48), case.oracle(), 1e-2)


def test_label_smoothing_is_that_of_torch():
  torch = pytest.importorskip("torch")
  case = Case.draw(1, 20, 16, 30)
  logits = torch.tensor(np.asarray(case.x[0] @ case.head))
  each = torch.nn.functional.cross_entropy(
    logits, torch.tensor(case.targets[0]), label_smoothing=0.2, reduction="none"
  ).numpy()
  got = case.loss(case.x, case.head, label_smoothing=0.2).loss_sum
  np.testing.assert_allclose(got, (each * case.weights[0]).sum(), rtol=1e-5)


def test_the_same_twice():
  case = Case.draw(2, 50, 24, 53)
  jax.tree.map(np.testing.assert_array_equal, *(case.sums_and_gradients(chunk=32) for _ in range(2)))


def test_the_target_wins_a_tie():
  x, head = jnp.ones((1, 1, 4)), jnp.ones((4, 6))
  assert cross_entropy(x, head, jnp.full((1, 1), 5), jnp.ones((1, 1))).correct_sum == 1


def test_memory_does_not_grow_with_the_vocabulary():
  def of(V):
    loss = lambda x, h, t, w: cross_entropy(x, h, t, w).loss_sum  # noqa: E731
    return temporaries(loss, 8192, 16, V, jnp.float32, lambda f, avals: jax.jit(f).lower(*avals).compile())

  small, large = of(1 << 17), of(1 << 19)
  outputs = 16 * 4 * ((1 << 19) - (1 << 17))  # the head's gradient, before it is scaled
  assert large - small <= 2 * outputs and large < 0.1 * (2 * 4 * 8192 << 19)


@pytest.mark.parametrize(
  "options,message",
  [
    (dict(label_smoothing=1.0), "label_smoothing"),
    (dict(transposed=True), r"\[V, D\]"),
    (dict(backend="cudnn"), "no backend 'cudnn'"),
    (dict(backend="mosaic_gpu", target="v5e"), "no backend 'mosaic_gpu' on v5e"),
    (dict(backend="mosaic_gpu", target="h100"), "bfloat16 and float16 only|needs jax"),
    (dict(backend="pallas_tpu", target="v5e", float16=True), "bfloat16 and float32|needs jax"),
    (dict(backend="auto"), "needs target="),
  ],
)
def test_what_cannot_be(options, message):
  case = Case.draw(1, 4, 8, 10, dtype=jnp.float16 if options.pop("float16", False) else jnp.float32)
  with pytest.raises(ConfigError, match=message):
    cross_entropy(case.x, case.head, jnp.asarray(case.targets), jnp.asarray(case.weights), **options)
