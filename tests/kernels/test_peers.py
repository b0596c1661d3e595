"""Our numbers beside those of qwix and tokamax, where they are installed (`pip install -e '.[peers]'`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import kernels

W = np.random.default_rng(0).standard_normal((256, 48)).astype(np.float32) * 0.1
X = np.random.default_rng(1).standard_normal((24, 256)).astype(np.float32)

# format, group size, zero points -> qwix' arguments
SAME = {
  "int8": (("int8", None, False), {"qtype": jnp.int8}),
  "int8 groups": (("int8", 64, False), {"qtype": jnp.int8, "tiled_axes": {0: 64}}),
  "int4 groups": (("int4", 32, False), {"qtype": jnp.int4, "tiled_axes": {0: 32}}),
  "int4 zeros": (
    ("int4", 32, True),
    {"qtype": jnp.int4, "tiled_axes": {0: 32}, "calibration_method": "minmax"},
  ),
  "nf4": (("nf4", 64, False), {"qtype": "nf4", "tiled_axes": {0: 64}}),
  "fp8": (("fp8", None, False), {"qtype": jnp.float8_e4m3fn}),
}


@pytest.mark.parametrize("name", SAME)
def test_same_weights_as_qwix(name):
  """The same dequantized values, but for weights that lie half way between two codes."""
  qwix = pytest.importorskip("qwix")
  (format, group_size, asymmetric), options = SAME[name]
  ours = np.asarray(kernels.dequantize(kernels.quantize(jnp.asarray(W), format, group_size, asymmetric=asymmetric)))
  theirs = np.asarray(qwix.dequantize(qwix.quantize(jnp.asarray(W), channelwise_axes=[1], **options)))
  assert (np.abs(ours - theirs) <= 1e-5 * np.abs(W).max()).mean() > 0.999
  assert 1e-3 < np.abs(ours - W).max() / np.abs(W).max() < 0.3  # rounded, but to something near


@pytest.mark.parametrize("format,qtype", [("int8_dynamic", jnp.int8), ("fp8_dynamic", jnp.float8_e4m3fn)])
def test_rounded_activations_are_as_good_as_those_of_qwix(format, qtype):
  """Bounds of a token's range differ by half a step, so codes may differ, and the error of a product may not."""
  qwix = pytest.importorskip("qwix")
  truth = X.astype(np.float64) @ W
  ours = kernels.quantized_matmul(jnp.asarray(X), kernels.quantize(jnp.asarray(W), format))
  theirs = qwix.dot(
    qwix.quantize(jnp.asarray(X), qtype, channelwise_axes=[0]),
    qwix.quantize(jnp.asarray(W), qtype, channelwise_axes=[1]),
  )
  errors = [np.sqrt(np.mean((np.asarray(y, np.float64) - truth) ** 2) / np.mean(truth**2)) for y in (ours, theirs)]
  assert errors[0] < 1.1 * errors[1] and errors[1] < 1.1 * errors[0]


ATTENTION = {
  "causal": ({}, {"is_causal": True}),
  "full": ({"visibility": kernels.Visibility(causal=False)}, {}),
  "window": ({"visibility": kernels.Visibility(window=7)}, {"is_causal": True, "local_window_size": (6, 0)}),
  "softcap": ({"softcap": 2.0}, {"is_causal": True, "logits_soft_cap": 2.0}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_and_gradients_as_tokamax(name):
  tokamax = pytest.importorskip("tokamax")
  ours, theirs = ATTENTION[name]
  rng = np.random.default_rng(2)
  q, k, v, d_out = (jnp.asarray(rng.standard_normal((2, 24, heads, 16)), jnp.float32) for heads in (4, 2, 2, 4))

  def run(attend):
    out, pullback = jax.vjp(attend, q, k, v)
    return out, *pullback(d_out)

  want = run(lambda *x: tokamax.dot_product_attention(*x, implementation="xla", precision="highest", **theirs))
  got = run(lambda *x: kernels.flash_attention(*x, **ours))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_cross_entropy_and_gradients_as_tokamax():
  tokamax = pytest.importorskip("tokamax")
  rng = np.random.default_rng(3)
  x, head = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((32, 16), (16, 200)))
  targets = jnp.asarray(rng.integers(0, 200, 32), jnp.int32)

  def whole(x, head):
    return tokamax.linear_softmax_cross_entropy_loss(x, targets, head, reduction="sum", implementation="xla")

  def ours(x, head):
    return kernels.cross_entropy(x[None], head, targets[None], jnp.ones((1, 32)), chunk=8).loss_sum

  got, want = (jax.value_and_grad(loss, (0, 1))(x, head) for loss in (ours, whole))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
