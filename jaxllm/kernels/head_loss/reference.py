"""The head's loss in plain JAX, a chunk of tokens with all its logits at a time; other backends are compared to it."""

import functools

import jax.numpy as jnp
from jax import lax

from jaxllm.kernels.backends import TARGETS
from jaxllm.kernels.head_loss import chunks
from jaxllm.kernels.head_loss.chunks import Part, Plan

# Logits of a chunk at most: 384 MiB, and 192 for their gradient in 16 bits. XLA for TPU makes the gradient over them.
LOGITS, LOGITS_TPU = 3 << 25, 1 << 27
CPU_ROWS = 1024  # more are no faster there


def _plan(call, x, head, keep):
  part = functools.partial(_part, call.options)
  pinned = TARGETS[call.target or "cpu"] == "tpu"
  return Plan(part, x, head.astype(x.dtype), _rows(x, head, call.options, call.target), pinned=pinned)


forward, backward = chunks.by(_plan)


def _rows(x, head, options, target):
  if options.chunk is not None:
    return min(options.chunk, x.shape[0])
  family = TARGETS[target or "cpu"]
  budget, most = LOGITS_TPU if family == "tpu" else LOGITS, CPU_ROWS if family == "cpu" else None
  return chunks.chunk_rows(x.shape[0], options.words(head), budget, 8, most)


def _part(options, x, w, targets, keep):
  contract = (((1,), (1 if options.transposed else 0,)), ((), ()))
  z = lax.dot_general(x, w, contract, preferred_element_type=jnp.float32)
  if options.softcap is not None:
    z = options.softcap * jnp.tanh(z / options.softcap)
  top = z.max(-1, keepdims=True)
  e = jnp.exp(z - top)
  at = jnp.take_along_axis(z, targets[:, None], axis=-1, mode="clip")
  sums = z.sum(-1, keepdims=True) if options.sums else None
  return Part(top, e.sum(-1, keepdims=True), at, sums, e if keep else None, z.shape[-1])
