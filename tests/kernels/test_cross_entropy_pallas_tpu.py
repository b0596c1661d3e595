"""The head's loss on TPU: in the emulator against float64, races watched, and compiled for four chips."""

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulators import needs_emulators, tpu_emulator
from head_loss_oracle import Case, assert_all_logits_take, assert_little_memory, close

from jaxllm.kernels import cross_entropy, tuning
from jaxllm.kernels.dispatch import Call
from jaxllm.kernels.head_loss.api import TOKENS
from jaxllm.kernels.head_loss.chunks import Coefficients, Options

sys.path.append(str(Path(__file__).parents[2] / "tools"))

pytestmark = needs_emulators
BACKEND = dict(backend="pallas_tpu", target="v5e")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu")


@pytest.fixture
def emulator(monkeypatch):
  import jax.experimental.pallas as pl

  from jaxllm.kernels.head_loss import pallas_tpu

  # The emulator gives back an output that lies over a ragged input with the input's padding.
  def apart(*args, input_output_aliases=None, **named):
    return pl.pallas_call(*args, **named)

  monkeypatch.setattr(pallas_tpu, "pl", SimpleNamespace(**(vars(pl) | {"pallas_call": apart})))
  with tpu_emulator():
    yield


@pytest.mark.parametrize(
  "size,dtype,transposed,options",
  [
    ((1, 128, 128, 512), jnp.bfloat16, False, {}),
    ((2, 50, 65, 301), jnp.float32, False, dict(z_loss=1e-2, softcap=3.0)),
    ((1, 150, 64, 700), jnp.float32, True, dict(label_smoothing=0.1, softcap=3.0)),
    ((1, 70, 70, 40), jnp.bfloat16, True, dict(label_smoothing=0.1, z_loss=1e-2)),
    ((1, 200, 64, 260), jnp.float32, False, dict(label_smoothing=0.1, chunk=128)),
  ],
)
def test_sums_and_gradients(emulator, size, dtype, transposed, options):
  case = Case.draw(*size, dtype=dtype, transposed=transposed)
  got = case.sums_and_gradients(**BACKEND, **options)
  options = {name: value for name, value in options.items() if name != "chunk"}
  close(got, case.oracle(**options), 2e-5 if dtype == jnp.float32 else 1e-2)


def test_float32_head_and_tokens_without_weight(emulator):
  case = Case.draw(1, 60, 64, 100, dtype=jnp.bfloat16, head_dtype=jnp.float32)
  case.weights[0, :4] = 0
  poison = jnp.where(case.weights[..., None] == 0, jnp.nan, case.x)
  got = dataclasses.replace(case, x=poison).sums_and_gradients(**BACKEND)
  close(got, case.oracle(), 1e-2)
  jax.tree.map(np.testing.assert_array_equal, got, case.sums_and_gradients(**BACKEND))  # the same twice, too


def test_token_log_probs(emulator):
  case = Case.draw(1, 80, 64, 300)
  d_logp, d_lse = np.random.default_rng(1).standard_normal((2, 1, 80))
  got = case.log_probs_and_gradients(d_logp, d_lse, **BACKEND)
  close(got, case.log_probs_oracle(d_logp, d_lse), 2e-5)


def test_several_blocks_of_tokens(emulator):
  from jaxllm.kernels.head_loss import pallas_tpu

  case = Case.draw(1, 300, 64, 300)
  ones, zeros = jnp.ones(300), jnp.zeros(300)
  k = Coefficients(ones, zeros, ones, zeros)
  inputs = case.x[0], case.head, jnp.asarray(case.targets[0]), k
  run = functools.partial(pallas_tpu.backward, Call(TOKENS, "pallas_tpu", options=Options()))
  with tuning.trying("cross_entropy", dict(tokens=128, words=128)):
    stats, dx, d_head = jax.jit(run)(*inputs)
  case.weights[:] = 1
  sums, want_dx, want_head = case.oracle(scale=1.0)
  close(((stats.lse - stats.at).sum(), dx[None], d_head), (sums[0], want_dx, want_head), 2e-5)


# ---------------------------------------------------------------- compiled for chips that are not here


@needs_libtpu
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "v7"])
@pytest.mark.parametrize(
  "D,V,dtype,options",
  [
    (4096, 128256, jnp.bfloat16, Options()),
    (2048, 151936, jnp.bfloat16, Options(30.0, True, label_smoothing=0.1)),
    (2048, 50257, jnp.float32, Options(label_smoothing=0.1)),
  ],
  ids=["llama 3", "every option", "float32"],
)
def test_compiles(chip, D, V, dtype, options):
  """Both kernels, for one chunk of tokens: blocks that do not fit the vector memory would be an error."""
  import machine_code

  from jaxllm.kernels.head_loss import pallas_tpu

  tiles = pallas_tpu._tiles(D, dtype, chip)

  def run(x, head, targets, scale):
    part = pallas_tpu._part(options, tiles, chip, V, x, head, targets, True)
    k = Coefficients(scale, scale, scale, scale)
    return part.totals, pallas_tpu._finish(options, tiles, chip, part, part.tops * scale[:, None], targets, k)

  s = jax.ShapeDtypeStruct
  head = s((V, D) if options.transposed else (D, V), dtype)
  inputs = s((1024, D), dtype), head, s((1024,), jnp.int32), s((1024,), jnp.float32)
  text = machine_code.compile_tpu(run, inputs, chip).as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 2


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
  "chip,backend", [*((chip, "pallas_tpu") for chip in ("v5e", "v5p", "v6e", "v7")), ("v5e", "xla"), ("v7", "xla")]
)
def test_memory(chip, backend):
  """v7 also has layouts of its own, for which XLA copies head and gradient unless it is kept from it."""
  import machine_code

  fused = lambda x, h, t, w: cross_entropy(x, h, t, w, backend=backend, target=chip).loss_sum  # noqa: E731
  assert_little_memory(fused, lambda f, avals: machine_code.compile_tpu(f, avals, chip), growth=chip == "v7")


@needs_libtpu
@pytest.mark.slow
def test_memory_of_all_logits():
  import machine_code

  assert_all_logits_take(lambda f, avals: machine_code.compile_tpu(f, avals, "v5e"))
