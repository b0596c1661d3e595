"""All layers in one C++ call against float64, and in the engine against the plain loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels import KVPages, cpu_ffi, cpu_layers, dequantize, quantize

pytestmark = pytest.mark.skipif(not cpu_ffi.available(), reason="needs the C++ kernels")
D, HEADS, K, H, F, PAGE, PAGES = 96, 6, 2, 16, 160, 4, 40
SHAPES = [(D, HEADS * H), (D, K * H), (D, K * H), (HEADS * H, D), (D, F), (D, F), (F, D)]
FORMATS = {
  "float32": (jnp.float32, None),
  "bfloat16": (jnp.bfloat16, None),
  "int8": (jnp.bfloat16, dict(format="int8")),
  "int8 in float32": (jnp.float32, dict(format="int8", group_size=32)),
  "int8 of groups": (jnp.bfloat16, dict(format="int8", group_size=32)),
  "int4": (jnp.bfloat16, dict(format="int4")),
  "int4 with zero points": (jnp.bfloat16, dict(format="int4", group_size=32, asymmetric=True)),
  "nf4": (jnp.float32, dict(format="nf4", group_size=32)),
}


ZEROS = dict(format="int4", group_size=32, asymmetric=True)


def normal(seed, *shape, scale=1.0, dtype=jnp.float32):
  return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def layer(seed, dtype, how):
  matrices = [normal(seed + i, *s, scale=s[0] ** -0.5, dtype=dtype) for i, s in enumerate(SHAPES)]
  matrices = [w if how is None else quantize(w, **how) for w in matrices]
  pages = dataclasses.replace(
    KVPages.zeros(PAGES, PAGE, K, H, "float32"),
    keys=normal(seed + 8, PAGES, K, PAGE, H),
    values=normal(seed + 9, PAGES, K, PAGE, H),
  )
  return cpu_layers.Layer(
    1 + normal(seed + 10, D, scale=0.1), 1 + normal(seed + 11, D, scale=0.1), tuple(matrices), pages
  )


def reference(x, rope, table, sequence, position, layers, eps, scale):
  """The same in float64, token by token; with the pages that it writes."""
  real = lambda a: np.asarray(a, np.float64)  # noqa: E731
  x, (cos, sin), table = real(x), map(real, rope), np.asarray(table)
  norm = lambda x, w: x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * real(w)  # noqa: E731

  def rotate(x):
    a, b = x[..., : H // 2], x[..., H // 2 :]
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], -1)

  written = []
  for one in layers:
    q, k, v, o, gate, up, down = (real(dequantize(w) if hasattr(w, "scales") else w) for w in one.matrices)
    keys, values = np.array(real(one.pages.keys)), np.array(real(one.pages.values))
    y = norm(x, one.attention_norm)
    query, key = rotate((y @ q).reshape(-1, HEADS, H)), rotate((y @ k).reshape(-1, K, H))
    value, out = (y @ v).reshape(-1, K, H), np.zeros((len(x), HEADS, H))
    for m, (row, at) in enumerate(zip(sequence, position)):
      if at >= 0 and table[row, at // PAGE] < PAGES:
        keys[table[row, at // PAGE], :, at % PAGE] = key[m]
        values[table[row, at // PAGE], :, at % PAGE] = value[m]
    for m, (row, at) in enumerate(zip(sequence, position)):
      places = [(table[row, s // PAGE], s % PAGE) for s in range(at + 1)]
      for n in range(HEADS if at >= 0 else 0):
        own = np.stack([keys[page, n * K // HEADS, slot] for page, slot in places])
        weights = np.exp(own @ query[m, n] * scale)
        out[m, n] = weights @ np.stack([values[p, n * K // HEADS, s] for p, s in places]) / weights.sum()
    x = x + out.reshape(len(x), -1) @ o
    y = norm(x, one.mlp_norm)
    g = y @ gate
    x = x + (g / (1 + np.exp(-g)) * (y @ up)) @ down
    written.append((keys, values))
  return x, written


CODES = [
  dict(format="int8"),
  dict(format="int8", group_size=64),
  dict(format="int4"),
  dict(format="int4", group_size=32),
  dict(format="int4", group_size=256),
  dict(format="int4", group_size=32, asymmetric=True),
  dict(format="nf4", group_size=64),
]


@pytest.mark.parametrize("inputs", [96, 300, 416, 640])
@pytest.mark.parametrize("how", CODES, ids=lambda how: "-".join(map(str, how.values())))
def test_codes(how, inputs):
  """One token has a way of its own; rows that do not fill a block of codes, or four rows."""
  inputs += -inputs % how.get("group_size", 1)
  w = quantize(normal(1, inputs, 37, scale=inputs**-0.5), **how)
  rtol = 4e-3 if how["format"] == "nf4" else 1e-5  # whose table is rounded to bfloat16
  for tokens in (1, 2):
    x = normal(2, tokens, inputs, dtype=jnp.bfloat16)
    assert not cpu_layers.few_refuses(x, w)
    want = np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64)
    np.testing.assert_allclose(cpu_layers.few(x, w), want, rtol=rtol, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 9, 16])
@pytest.mark.parametrize("kind", FORMATS)
def test_layers(kind, tokens):
  dtype, how = FORMATS[kind]
  layers = [layer(20 * i, dtype, how) for i in range(2)]
  random = np.random.default_rng(tokens)
  table = random.permutation(PAGES)[:36].reshape(3, 12)
  sequence = np.sort(random.integers(0, 3, tokens))
  position = np.zeros(tokens, int)
  for row in range(3):  # the new tokens of a row follow each other
    own = sequence == row
    position[own] = random.integers(0, 30) + np.arange(own.sum())
  if tokens > 4:
    position[-1] = -1
  angles = np.maximum(position, 0)[:, None] * 1e4 ** -(np.arange(H // 2) / (H // 2))
  rope = (jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))
  x = normal(99, tokens, D)
  assert cpu_layers.refuses(tokens, layers, jnp.dtype(dtype)) is None
  how = dict(eps=1e-5, scale=H**-0.5)
  arrays = (jnp.asarray(table), jnp.asarray(sequence), jnp.asarray(position))
  y, pages = cpu_layers.run(x, rope, *arrays, layers, heads=HEADS, dtype=jnp.dtype(dtype), **how)
  want, written = reference(x, rope, table, sequence, position, layers, **how)
  close = dict(rtol=2e-5, atol=2e-5) if dtype == jnp.float32 else dict(rtol=0.02, atol=0.04)
  real = position >= 0
  np.testing.assert_allclose(np.asarray(y)[real], want[real], **close)
  for new, (keys, values) in zip(pages, written):
    np.testing.assert_allclose(new.keys, keys, **close)
    np.testing.assert_allclose(new.values, values, **close)


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("how", [dict(format="int8"), ZEROS, dict(format="int4")])
def test_few_rows_of_codes(rows, how):
  """D is no multiple of a block, F none of a tile."""
  w = quantize(normal(1, 800, 70, scale=0.05), **how)
  x = normal(2, rows, 800, dtype=jnp.bfloat16)
  want = np.asarray(x, np.float64) @ np.asarray(dequantize(w), np.float64)
  np.testing.assert_allclose(cpu_layers.few(x, w), want, rtol=1e-3, atol=1e-3)


def test_what_is_refused():
  good = layer(0, jnp.float32, None)
  assert "tokens" in cpu_layers.refuses(17, [good], jnp.dtype(jnp.float32))
  assert "float16" in cpu_layers.refuses(1, [good], jnp.dtype(jnp.float16))
  mixed = dataclasses.replace(good, matrices=(good.matrices[0].astype(jnp.bfloat16), *good.matrices[1:]))
  assert "queries" in cpu_layers.refuses(1, [mixed], jnp.dtype(jnp.float32))
