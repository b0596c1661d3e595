"""llama.cpp computes what we do from the files that we write (where llama-cpp-python is installed)."""

import gguf_models
import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from jaxllm.interop.gguf import write_gguf
from jaxllm.interop.huggingface import from_huggingface
from jaxllm.models.build import declare
from jaxllm.models.config import Compute

pytestmark = pytest.mark.slow
llama_cpp = pytest.importorskip("llama_cpp")
TOKENS = np.random.default_rng(1).integers(5, 300, 40)


@pytest.mark.parametrize("name", gguf_models.CONFIGS)
def test_logits(tmp_path, name, sentencepiece_bpe):
  hf, tensors = gguf_models.checkpoint(name)
  write_gguf(tmp_path / "x.gguf", hf, tensors, sentencepiece_bpe)
  exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
  theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), n_ctx=128, logits_all=True, n_threads=2, verbose=False, **exact)
  theirs.eval(TOKENS.tolist())
  config, params = from_huggingface(hf, tensors)
  params = traverse_util.unflatten_dict({path: tensor.read() for path, tensor in params.items()}, sep="/")
  graph = declare(config, Compute(attention="xla", unroll_layers=1))[0]
  ours = jax.jit(lambda p, t: nnx.merge(graph, p)(t)[0])(params, TOKENS[None])[0]
  assert np.std(ours) > 0.05
  # ggml looks gelu up in a table of float16.
  tolerance = 5e-3 if "gelu" in config.mlp or "geglu" in config.mlp else 2e-4
  np.testing.assert_allclose(theirs.scores[: len(TOKENS)], ours, rtol=0, atol=tolerance)
