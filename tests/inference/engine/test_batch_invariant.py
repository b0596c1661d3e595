"""`compute.batch_invariant`: the engine's log-probabilities, in any company, are the objectives' to the bit."""

import dataclasses
import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine import Engine, Request
from jaxllm.inference.engine.speculation import Speculation
from jaxllm.inference.params import SamplingParams
from jaxllm.kernels import cpu_ffi
from jaxllm.models.build import declare, unstack_layers
from jaxllm.models.config import Compute, MLAConfig, ModelConfig, MoEConfig
from jaxllm.models.head import token_log_probs
from jaxllm.models.quantization import quantize_matrix
from jaxllm.models.weights import cast, map_weights_with_path
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh

SIZES = dict(vocab_size=101, embed_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, max_seq_len=64)
KINDS = {
  "llama": dict(mlp_dim=340),  # more inputs than one chunk of sums
  "window": dict(sliding_window=7, layer_pattern=("local", "global"), qk_norm="head", tie_embeddings=False),
  "gemma": dict(
    attention_softcap=5.0,
    logit_softcap=8.0,
    mlp="geglu_tanh",
    embedding_scale=48**0.5,
    norm_unit_offset=True,
    norm_placement="sandwich",
  ),
  "gpt2": dict(norm="layernorm", mlp="gelu_tanh", position="learned", attention_bias=True, mlp_bias=True),
  "neox": dict(norm="layernorm", mlp="gelu", rope_fraction=0.5, parallel_residual=True, attention_bias=True),
  "alibi": dict(position="alibi", mlp="relu"),
}
CASES = [(kind, "float32", None) for kind in KINDS]
CASES += [("llama", "bfloat16", None), ("gemma", "bfloat16", None), ("llama", "float32", "int8")]
CASES += [("llama", "bfloat16", "int4")]
# Lengths on either side of a page, a step and, in the last, of a tile of queries.
PROMPTS = [[7], [3, 1, 4, 1, 5, 3, 1], list(range(40, 52)), list(range(60, 77)), [*range(80, 97), *range(23)]]
COUNT = 9

pytestmark = pytest.mark.skipif(not cpu_ffi.available(), reason=str(cpu_ffi.why_unavailable()))


def compute(dtype="float32", **settings):
  return Compute(dtype=dtype, **dict(batch_invariant=True, unroll_layers=1) | settings)


@functools.cache
def model(kind, dtype, format):
  """(config, stacked params) with every weight random."""
  config = ModelConfig(**SIZES, **KINDS[kind])
  params = cast(oracle.random_params(config), dtype)
  return config, map_weights_with_path(lambda path, w: quantize_matrix(path, w, format), params)


def engine(kind, dtype, format, mode=None, **settings):
  config, params = model(kind, dtype, format)
  sizes = dict(max_num_seqs=5, page_size=4, max_tokens_per_step=16, row_buckets=(1, 5), token_buckets=(16,))
  return Engine(config, unstack_layers(params), compute=mode or compute(dtype), **sizes | settings)


def requests(salt="", count=COUNT):
  settings = dict(temperature=0.9, top_p=0.9, max_tokens=count, ignore_eos=True, logprobs=0)
  return [Request(p, SamplingParams(seed=i, **settings), salt=salt and f"{salt}{i}") for i, p in enumerate(PROMPTS)]


def serve(engine, requests):
  """What each request draws, and the log-probabilities that the engine gives."""
  deltas, numbers = {}, [engine.submit(request) for request in requests]
  while engine.busy:
    harness.collect(engine.step(), deltas)
  found = []
  for number in numbers:
    tokens = [token for delta in deltas[number] for token in delta.token_ids]
    shown = [shown for delta in deltas[number] for shown in delta.logprobs or ()]
    found.append((tokens, np.float32([each[token].logprob for token, each in zip(tokens, shown, strict=True)])))
  return found


def same(found, want):
  assert [tokens for tokens, _ in found] == [tokens for tokens, _ in want]
  for (_, got), (_, values) in zip(found, want, strict=True):
    np.testing.assert_array_equal(got, values)


def objective(kind, dtype, format, mode=None):
  """(tokens, segment ids) -> the log-probability of each token but the first, as objectives have it."""
  config, params = model(kind, dtype, format)
  graph = declare(config, mode or compute(dtype))[0]

  @jax.jit
  def run(tokens, segments, positions):
    hidden, _ = nnx.merge(graph, params).hidden(tokens[:, :-1], segment_ids=segments[:, :-1], positions=positions)
    return token_log_probs(nnx.merge(graph, params), hidden, tokens[:, 1:], segments[:, 1:] != 0)

  def scored(texts, rows, width):
    """Of texts that stand in so many rows one after the other, at the ends of their rows padding."""
    tokens, segments, positions = (np.zeros((rows, width), np.int32) for _ in range(3))
    free, places = np.zeros(rows, int), []
    for number, text in enumerate(texts):
      row, length = number % rows, len(text)
      at = slice(free[row], free[row] + length)
      tokens[row, at], segments[row, at], positions[row, at] = text, number + 1, np.arange(length)
      places.append((row, free[row]))
      free[row] += length
    found = np.asarray(run(tokens, segments, positions[:, :-1]))
    return [found[row, at : at + len(text) - 1] for (row, at), text in zip(places, texts)]

  return scored


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype, format", CASES)
def test_engine_and_objective_agree_to_the_bit(kind, dtype, format):
  """Together with too few pages, in parts, with a beginning found, alone; as a text that is read; as in training."""
  served = engine(kind, dtype, format, num_pages=24)
  want = serve(served, requests())
  assert kind == "window" or served.stats()["preemptions"]
  assert all(np.isfinite(values).all() and len(values) == COUNT for _, values in want)
  hits = served.stats()["prefix_hits"]
  same(serve(served, requests()[-1:]), want[-1:])
  assert served.stats()["prefix_hits"] > hits
  same([serve(served, [request])[0] for request in requests("alone")], want)

  texts = [[*prompt, *tokens] for prompt, (tokens, _) in zip(PROMPTS, want)]
  behind = lambda scores: [(tokens, s[-COUNT:]) for (tokens, _), s in zip(want, scores, strict=True)]  # noqa: E731
  same(behind(served.score(texts)), want)
  scored = objective(kind, dtype, format)
  same(behind(scored(texts, rows=5, width=60)), want)  # a text a row, padded
  same(behind(scored(texts, rows=1, width=140)), want)  # packed


@pytest.mark.slow
@pytest.mark.parametrize("settings", [dict(max_tokens_per_step=7, token_buckets=(7,)), dict(page_size=16)], ids=str)
def test_steps_and_pages_of_any_size(settings):
  case = "window", "float32", None
  same(serve(engine(*case, **settings), requests()), serve(engine(*case), requests()))


@pytest.mark.slow
def test_guesses():
  case = "llama", "float32", None
  guessing = engine(*case, speculative=Speculation("ngram", prompt_lookup_min=1, adaptive=False))
  want = serve(engine(*case), requests(count=20))
  same(serve(guessing, requests(count=20)), want)
  assert guessing.stats()["draft_tokens"]


def test_without_the_mode_they_differ_by_rounding():
  """So the tests above can fail, and the usual mode is within 1e-5."""
  case, usual = ("llama", "float32", None), Compute(unroll_layers=1)
  want = serve(engine(*case, mode=usual), requests())
  texts = [[*prompt, *tokens] for prompt, (tokens, _) in zip(PROMPTS, want)]
  scores = objective(*case, mode=usual)(texts, rows=1, width=140)
  worst = max(np.abs(s[-COUNT:] - values).max() for s, (_, values) in zip(scores, want))
  assert 0 < worst < 1e-5


@pytest.mark.parametrize("kind", ["window", "gemma", "gpt2"])
def test_gradients_are_those_of_the_usual_mode(kind):
  config, params = model(kind, "float32", None)
  tokens = np.random.default_rng(0).integers(0, 101, (2, 40)).astype(np.int32)
  segments = np.int32([[1] * 23 + [2] * 17, [1] * 35 + [0] * 5])

  def gradients(mode):
    graph = declare(config, mode)[0]

    def loss(params):
      model = nnx.merge(graph, params)
      hidden, _ = model.hidden(tokens[:, :-1], segment_ids=segments[:, :-1])
      return token_log_probs(model, hidden, tokens[:, 1:], segments[:, 1:] != 0).mean()

    return jax.jit(jax.grad(loss))(params)

  got, want = gradients(compute()), gradients(Compute(kernels="xla", unroll_layers=1))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert float(jnp.abs(a - b).max()) <= 1e-5 * max(1.0, float(jnp.abs(b).max()))


@pytest.mark.parametrize(
  "settings, said",
  [
    (dict(attention="xla"), "compute.attention is 'xla', which is not batch-invariant"),
    (dict(kernels="xla"), "compute.kernels is 'xla', which is not batch-invariant"),
    (dict(target="h100"), "CPUs only, and compute.target is 'h100'"),
    (dict(dtype="float16"), "'float32' and 'bfloat16', not 'float16'"),
  ],
)
def test_what_the_mode_is_not_for(settings, said):
  with pytest.raises(ConfigError, match=said):
    compute(**settings)


@pytest.mark.parametrize(
  "part",
  [
    dict(moe=MoEConfig(num_experts=4)),
    dict(mla=MLAConfig(kv_lora_rank=16, nope_head_dim=16, rope_head_dim=16, value_head_dim=16), num_kv_heads=4),
    dict(attention_sinks=True),
    dict(position="relative"),
    dict(head_bias=True),
    dict(head_dim=20),
  ],
  ids=str,
)
def test_models_that_the_mode_is_not_for(part):
  config = ModelConfig(**SIZES | ({"head_dim": 0} if "mla" in part else {}) | part)
  with pytest.raises(
    ConfigError, match=f"compute.batch_invariant is not for a model with ({next(iter(part))}|a relative bias)"
  ):
    declare(config, compute())


def test_no_devices_that_split_it():
  from jaxllm.models.config import ComputeConfig

  with pytest.raises(ConfigError, match="one CPU device, not 2"):
    ComputeConfig(batch_invariant=True).on("cpu", 2)
  assert dataclasses.replace(ComputeConfig(), batch_invariant=True).on("cpu", 1).backend("matmul") == "cpu_invariant"


def test_no_mesh_of_several():
  mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
  config = ModelConfig(vocab_size=64, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=16)
  with pytest.raises(ConfigError, match="one CPU device, not a mesh of 2"):
    Engine(config, oracle.random_params(config), mesh=mesh, compute=compute())
