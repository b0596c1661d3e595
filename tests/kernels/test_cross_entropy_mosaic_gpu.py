"""The head's loss on Hopper: in the emulator against float64, races watched, and as H100 machine code."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulators import gpu_emulator, needs_emulators
from head_loss_oracle import Case, assert_all_logits_take, assert_little_memory, close

from jaxllm.base.errors import UserError
from jaxllm.kernels import cross_entropy, tuning
from jaxllm.kernels.dispatch import Call
from jaxllm.kernels.head_loss.api import TOKENS
from jaxllm.kernels.head_loss.chunks import Options

sys.path.append(str(Path(__file__).parents[2] / "tools"))

pytestmark = needs_emulators
BACKEND = dict(backend="mosaic_gpu", target="h100")


@pytest.fixture
def emulator():
  with gpu_emulator(timeout=150):
    yield


@pytest.mark.parametrize(
  "size,dtype,transposed,options",
  [
    ((1, 128, 64, 256), jnp.float16, False, {}),
    ((2, 50, 65, 301), jnp.bfloat16, False, dict(z_loss=1e-2, softcap=3.0)),
    ((1, 150, 128, 301), jnp.bfloat16, True, dict(label_smoothing=0.1, softcap=3.0)),
    ((1, 70, 70, 40), jnp.float16, True, dict(label_smoothing=0.1, z_loss=1e-2)),
    ((1, 200, 64, 260), jnp.bfloat16, False, dict(label_smoothing=0.1, chunk=128)),
  ],
)
def test_sums_and_gradients(emulator, size, dtype, transposed, options):
  case = Case.draw(*size, dtype=dtype, transposed=transposed)
  got = case.sums_and_gradients(**BACKEND, **options)
  options = {name: value for name, value in options.items() if name != "chunk"}
  close(got, case.oracle(**options), 1e-2)


def test_float32_head_and_tokens_without_weight(emulator):
  case = Case.draw(1, 60, 64, 100, dtype=jnp.bfloat16, head_dtype=jnp.float32)
  case.weights[0, :4] = 0
  poison = jnp.where(case.weights[..., None] == 0, jnp.nan, case.x)
  got = dataclasses.replace(case, x=poison).sums_and_gradients(**BACKEND)
  close(got, case.oracle(), 1e-2)
  jax.tree.map(np.testing.assert_array_equal, got, case.sums_and_gradients(**BACKEND))  # the same twice, too


def test_token_log_probs(emulator):
  case = Case.draw(1, 80, 64, 300, dtype=jnp.bfloat16)
  d_logp, d_lse = np.random.default_rng(1).standard_normal((2, 1, 80))
  got = case.log_probs_and_gradients(d_logp, d_lse, **BACKEND)
  close(got, case.log_probs_oracle(d_logp, d_lse), 1e-2)


def test_blocks_that_share_a_multiprocessor(emulator):
  """More blocks than multiprocessors, more steps than stages, groups of tokens that do not come out even."""
  from jaxllm.kernels.head_loss import mosaic_gpu

  case = Case.draw(1, 384, 192, 320, dtype=jnp.bfloat16)
  run = functools.partial(mosaic_gpu.forward, Call(TOKENS, "mosaic_gpu", options=Options(label_smoothing=0.1)))
  with tuning.trying("cross_entropy", dict(words=128, stages=2, group=2, blocks=2)):
    got = jax.jit(run)(case.x[0], case.head, jnp.asarray(case.targets[0]))
  z = case.logits(None)[2]
  want = np.log(np.exp(z).sum(-1)), z[np.arange(384), case.targets[0]], z.max(-1), z.sum(-1)
  close(got, want, 1e-4)


@pytest.mark.parametrize("D,V,transposed", [(128, 5000, False), (65, 301, False), (64, 2000, True), (65, 301, True)])
def test_lowers_for_any_vocabulary(D, V, transposed):
  """The emulator copies tiles of any array; TMA's are whole numbers of the swizzle's tiles."""
  s = jax.ShapeDtypeStruct
  loss = lambda x, h, t, w: cross_entropy(x, h, t, w, transposed=transposed, **BACKEND).loss_sum  # noqa: E731
  of_tokens = s((1, 200), jnp.int32), s((1, 200), jnp.float32)
  inputs = s((1, 200, D), jnp.bfloat16), s((V, D) if transposed else (D, V), jnp.bfloat16), *of_tokens
  jax.jit(jax.grad(loss, (0, 1))).trace(*inputs).lower(lowering_platforms=("cuda",))


# ---------------------------------------------------------------- compiled for an H100


@pytest.fixture(scope="module")
def compiler():
  """tools/machine_code.py, where there is what it needs."""
  import machine_code

  from jaxllm.parallel.topologies import gpu_mesh

  if not all(machine_code.find_tool(name) for name in ("ptxas", "nvdisasm")):
    pytest.skip("machine code needs ptxas and nvdisasm")
  try:
    gpu_mesh("h100")
  except UserError as error:
    pytest.skip(str(error))
  return machine_code


@pytest.mark.parametrize("keep", [True, False], ids=["gradients", "statistics"])
@pytest.mark.parametrize(
  "D,V,dtype,options",
  [
    (4096, 128256, jnp.bfloat16, Options()),
    (2048, 151936, jnp.bfloat16, Options(30.0, True, label_smoothing=0.1)),
    (2048, 151936, jnp.float16, Options(label_smoothing=0.1)),
    (2048, 262144, jnp.bfloat16, Options(30.0, True)),
  ],
  ids=["llama 3", "every option", "label smoothing, float16", "gemma"],
)
def test_machine_code(compiler, D, V, dtype, options, keep):
  from jaxllm.kernels.head_loss import mosaic_gpu

  def run(x, w, targets):
    part = mosaic_gpu._part(options, mosaic_gpu.Tiles(), V, x, w, targets, keep)
    return part.tops, part.exponentials

  s = jax.ShapeDtypeStruct
  head = s((V, D) if options.transposed else (D, V), dtype)
  _, (code,) = compiler.compile_gpu(run, (s((1024, D), dtype), head, s((1024,), jnp.int32)))
  assert code.tensor_core > 0 and code.tma > 0, code
  assert code.spill_bytes == 0 and code.local == 0 and not code.serialized, code
  assert code.shared_bytes <= compiler.SHARED_MEMORY_LIMIT, code
  # A round of the pipeline keeps the tensor core busy: two warpgroups' instructions on four schedulers.
  assert 2 * code.loop_issue_cycles < code.loop_tensor_cycles, code


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mosaic_gpu", "xla"])
def test_memory(compiler, backend):
  """Beside the head's gradient little of all logits at a vocabulary of 128k, and hardly more at twice that."""
  fused = lambda x, h, t, w: cross_entropy(x, h, t, w, backend=backend, target="h100").loss_sum  # noqa: E731
  assert_little_memory(fused, lambda f, avals: compiler.compile_gpu(f, avals)[0])


@pytest.mark.slow
def test_memory_of_all_logits(compiler):
  assert_all_logits_take(lambda f, avals: compiler.compile_gpu(f, avals)[0])
