"""Descriptors of Hopper's bulk tensor copies, checked when a kernel is compiled.

They are made at the launch, and one that jaxlib's runtime (mosaic/gpu/runtime.cc) or the driver
(cuTensorMapEncodeTiled) does not like ends the process there.
"""

import contextlib


@contextlib.contextmanager
def checked():
  """While kernels are compiled inside, a descriptor that the launch would refuse is a ValueError."""
  from jax.experimental.mosaic.gpu import launch_context, utils
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import func

  real = launch_context.LaunchContext._get_tma_desc

  def check(self, gmem_ref, gmem_transform, peer, window, swizzle, reduction):
    argument = launch_context._find_kernel_argument_for_gmem_ref(gmem_ref)
    with ir.InsertionPoint(ir.Module.create().body):  # the kernel itself stays as it is
      aside = func.FuncOp("aside", ([argument.type], []))
    with ir.InsertionPoint(aside.add_entry_block()):
      (ref,) = aside.arguments
      for transform in gmem_transform:
        ref = transform.apply(ref)
      kind = ir.MemRefType(ref.type)
    size = utils.bytewidth(kind.element_type)
    strides = [size * stride for stride in kind.get_strides_and_offset()[0]]
    row = window[-1] * size
    plain = swizzle is None or getattr(swizzle, "name", "") == "kNoSwizzle"
    if not (
      1 <= len(window) <= 5
      and all(0 < n <= 1 << 32 for n in kind.shape)
      and strides[-1] == size
      and all(n % 16 == 0 and 0 < n < 1 << 40 for n in strides[:-1])
      and all(0 < n <= 256 for n in window)
      and row % 16 == 0
      and (plain or row <= swizzle)
    ):
      raise ValueError(f"no descriptor for boxes {list(window)} of {kind} with a swizzle of {swizzle} bytes")
    return real(self, gmem_ref, gmem_transform, peer, window, swizzle, reduction)

  launch_context.LaunchContext._get_tma_desc = check
  try:
    yield
  finally:
    launch_context.LaunchContext._get_tma_desc = real
