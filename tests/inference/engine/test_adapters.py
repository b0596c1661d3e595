"""A batch under several adapters draws what each model with its adapter alone draws in the plain loop."""

import dataclasses
import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from harness import Poisoned, greedy, serve

from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine import Engine, Request
from jaxllm.inference.engine.speculation import DraftModel, Speculation
from jaxllm.inference.params import SamplingParams
from jaxllm.kernels import cpu_ffi, quantize
from jaxllm.models.build import unstack_layers
from jaxllm.models.config import Compute, MLAConfig, ModelConfig, MoEConfig
from jaxllm.models.lora import DoraWeight, LoraWeight, column_lengths
from jaxllm.models.multi_lora import MultiLoraWeight, adapter_of
from jaxllm.models.weights import is_quantizable, map_weights_with_path
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh

SIZES = dict(vocab_size=104, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48, max_seq_len=48)
CONFIGS = {
  "tied": ModelConfig(**SIZES),
  "window": ModelConfig(**SIZES, tie_embeddings=False, sliding_window=5, layer_pattern=("local", "global")),
  "int8": ModelConfig(**SIZES),
  "nf4": ModelConfig(**SIZES),
  "wide": ModelConfig(**SIZES | {"embed_dim": 64}),  # whose heads the batch-invariant mode takes
  "pair": ModelConfig(**SIZES, architecture="encoder_decoder", position="relative", num_encoder_layers=2),
}
# Rank, kind, and the ends of the paths that each changes: one a few matrices, one the table that is the head too, one
# with magnitudes
ADAPTERS = {
  "narrow": (2, LoraWeight, ("query/weight", "value/weight")),
  "table": (5, LoraWeight, ("embedding/tokens", "head/weight", "down/weight", "key/weight")),
  "dora": (3, DoraWeight, ("output/weight", "up/weight", "embedding/tokens")),
}
PROMPTS = [[7], [3, 1, 4, 1, 5], list(range(40, 55)), list(range(80, 97))]
NAMES = (None, *ADAPTERS)
LOGPROBS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)


def base(kind):
  """Random weights, in these codes; a small embedding, or a tied head repeats the last token whatever came before."""

  def one(path, w):
    if kind in ("int8", "nf4") and is_quantizable(path):
      return quantize(w, kind, None if kind == "int8" else 16)
    return 0.2 * w if path == "embedding/tokens" else w

  return map_weights_with_path(one, oracle.random_params(CONFIGS[kind]))


def adapted(params, name):
  """The parameters with one of the adapters over them."""
  if name is None:
    return params
  rank, make, ends = ADAPTERS[name]

  def one(path, w):
    if not path.endswith(ends):
      return w
    rng = np.random.default_rng([len(path), rank])
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    *lead, inputs, outputs = w.shape
    more = {} if make is LoraWeight else {"magnitude": column_lengths(w) * (1 + 0.3 * draw(*lead, outputs))}
    return make(w, draw(*lead, inputs, rank) * inputs**-0.5, draw(*lead, rank, outputs) * 0.5, scale=0.8, **more)

  return map_weights_with_path(one, params)


def adapters(params):
  return {name: adapter_of(adapted(params, name)) for name in ADAPTERS}


def engine(kind="tied", **settings):
  params = base(kind)
  how = dict(compute=oracle.XLA, num_pages=8, adapters=adapters(params))
  return Poisoned(CONFIGS[kind], params, **how | settings)


def mix(prompts=PROMPTS, count=8):
  return [dataclasses.replace(greedy(prompt, count), adapter=name) for prompt in prompts for name in NAMES]


@functools.cache
def after(kind, name, tokens):
  """Log-probabilities [T, V] after each token, by the model with one adapter, without a cache."""
  config, params = CONFIGS[kind], base(kind)
  padded = np.zeros((1, config.max_seq_len), np.int32)
  padded[0, : len(tokens)] = tokens
  logits = oracle.forward(config)(adapted(params, name), padded)
  return np.asarray(jax.nn.log_softmax(logits))[0, : len(tokens)]


def plain_loop(kind, name, prompt, count=8):
  ids = list(prompt)
  for _ in range(count):
    ids.append(int(after(kind, name, tuple(ids))[-1].argmax()))
  return ids[len(prompt) :]


@functools.cache
def wanted(kind):
  want = [plain_loop(kind, request.adapter, request.prompt) for request in mix()]
  for each in zip(*[iter(want)] * len(NAMES)):  # of one prompt
    assert len(set(map(tuple, each))) == len(NAMES), "adapters that change nothing"
  return want


@pytest.mark.skipif(not cpu_ffi.available(), reason="needs the C++ kernels")
def test_in_the_batch_invariant_mode_any_mix_is_the_same_to_the_bit():
  asked = [dataclasses.replace(one, sampling=LOGPROBS) for one in mix(PROMPTS[1:3])]
  found = []
  for sizes in (
    dict(num_pages=40, max_num_seqs=8),
    dict(num_pages=9, max_num_seqs=3, max_model_len=32, max_tokens_per_step=16),
  ):
    served, deltas = engine("wide", compute=Compute(batch_invariant=True, unroll_layers=1), page_size=4, **sizes), {}
    numbers = [served.submit(one) for one in asked]
    while served.busy:
      harness.collect(served.step(), deltas)
    found.append([[(d.token_ids, d.logprobs) for d in deltas[n] if d.token_ids] for n in numbers])
  assert found[0] == found[1]
  assert all(shown for row in found[0] for _, shown in row)
  assert served.stats()["preemptions"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "window", "nf4"])
def test_any_mix_is_each_adapter_s_plain_loop(kind):
  served = engine(kind)
  assert serve(served, mix(), waits=(0, 0, 3, 1, 0, 2)) == wanted(kind)
  assert served.stats()["preemptions"] > 0
  assert serve(served, mix()[::-1]) == wanted(kind)[::-1]


def test_pages_are_of_one_adapter():
  served, prompt = engine(num_pages=40), PROMPTS[3]
  of = lambda name: dataclasses.replace(greedy(prompt, 8), adapter=name)  # noqa: E731
  for name in NAMES:
    before = served.stats()["prefix_hits"]
    first = serve(served, [of(name)])
    assert served.stats()["prefix_hits"] == before  # the others' pages are not found
    assert serve(served, [of(name)]) == first == [plain_loop("tied", name, prompt)]
    assert served.stats()["prefix_hits"] - before == 16


def test_pages_under_a_name_of_no_letters_are_not_the_models():
  params, prompt = base("tied"), PROMPTS[3]
  served = engine(num_pages=40, adapters={"": adapters(params)["dora"]})
  found = serve(served, [greedy(prompt, 8)]) + serve(served, [dataclasses.replace(greedy(prompt, 8), adapter="")])
  assert found == [plain_loop("tied", None, prompt), plain_loop("tied", "dora", prompt)]


def test_scores_and_log_probabilities():
  """All over 64 tokens at once, where the head takes them in parts."""
  served = engine(num_pages=80, max_num_seqs=6, row_buckets=(6,), token_buckets=(72,), max_tokens_per_step=72)
  texts, names = [PROMPTS[3]] * 5, [*NAMES, "table"]
  for text, name, score in zip(texts, names, served.score(texts, names), strict=True):
    want = after("tied", name, tuple(text))[np.arange(len(text) - 1), text[1:]]
    np.testing.assert_allclose(score, want, atol=1e-4)
  np.testing.assert_allclose(served.score([PROMPTS[2]], "dora"), served.score([PROMPTS[2]], ["dora"]))
  sampling = SamplingParams(temperature=0.7, seed=5, max_tokens=6, logprobs=1, ignore_eos=True)
  found = {}
  numbers = [served.submit(Request(PROMPTS[1], sampling, adapter=name)) for name in NAMES]
  while served.busy:
    harness.collect(served.step(), found)
  for number, name in zip(numbers, NAMES):
    drawn = [token for delta in found[number] for token in delta.token_ids]
    shown = [one for delta in found[number] for one in delta.logprobs]
    want = after("tied", name, (*PROMPTS[1], *drawn))[len(PROMPTS[1]) - 1 :]
    np.testing.assert_allclose([one[t] for one, t in zip(shown, drawn)], want[np.arange(6), drawn], atol=1e-4)
  with pytest.raises(ConfigError, match="2 adapters for 1 texts"):
    served.score([PROMPTS[0]], ["dora", None])
  assert served.stats()["pages_free"] == served.stats()["pages_total"]


def test_on_a_mesh():
  served = engine("window", mesh=make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2]))
  assert serve(served, mix()) == wanted("window")
  up = served._params["blocks"]["mlp"]["up"]["weight"][0]
  shards = [x.sharding.shard_shape(x.shape) for x in (up.base, up.a, up.b, up.factors)]
  assert shards == [(32, 24), (32, 3), (3, 24), (4, 24)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_guesses_change_no_text(method):
  small = ModelConfig(vocab_size=104, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_seq_len=48)
  draft = DraftModel(small, unstack_layers(oracle.random_params(small, 3)), oracle.XLA) if method == "draft" else None
  how = dict(num_speculative_tokens=3, prompt_lookup_min=1, adaptive=False)
  served = engine(speculative=Speculation(method, draft=draft, **how))
  assert serve(served, mix()) == wanted("tied")
  assert served.stats()["draft_tokens"] > 0


@pytest.mark.slow
def test_an_encoder_reads_under_the_adapter_too():
  config, params = CONFIGS["pair"], base("pair")
  served = engine("pair")
  prompts = PROMPTS[1:3]
  got = serve(served, mix(prompts))
  for i, name in enumerate(NAMES):
    alone = Poisoned(config, adapted(params, name), compute=oracle.XLA, num_pages=12)
    assert got[i :: len(NAMES)] == serve(alone, [greedy(prompt, 8) for prompt in prompts])
  assert len(set(map(tuple, got))) > len(NAMES)


def test_other_weights_under_the_same_adapters():
  params, other = base("tied"), map_weights_with_path(lambda path, w: w[..., ::-1], base("tied"))
  served = engine()
  assert serve(served, mix()) == wanted("tied")
  served.load_weights(other, "1")
  got = serve(served, mix())
  alone = Engine(CONFIGS["tied"], other, compute=oracle.XLA, adapters=adapters(params), **harness.SMALL)
  assert got == serve(alone, mix()) != wanted("tied")


def test_all_is_compiled_at_the_start():
  served = engine(num_pages=40)
  served.warm_up()
  count = served.stats()["compilations"]
  serve(served, mix(count=3))
  served.score(PROMPTS, "narrow")
  assert served.stats()["compilations"] == count


def test_without_adapters_nothing_is_there():
  served = engine(adapters={})
  assert served._state.adapters is None
  leaves = jax.tree.leaves(served._params, is_leaf=lambda w: isinstance(w, MultiLoraWeight))
  assert not any(isinstance(w, MultiLoraWeight) for w in leaves)
  with pytest.raises(ConfigError, match="there is no adapter 'narrow'; this engine has none"):
    served.submit(dataclasses.replace(greedy([1]), adapter="narrow"))


def test_a_request_for_an_unknown_adapter_harms_no_other():
  served = engine()
  with pytest.raises(ConfigError, match="there is no adapter 'other'; there are narrow, table, dora"):
    served.submit(dataclasses.replace(greedy([1]), adapter="other"))
  with pytest.raises(ConfigError, match="no adapter 'other'"):
    served.score(PROMPTS, ["narrow", None, "other", None])
  assert not served.busy and serve(served, mix()) == wanted("tied")


def test_adapters_that_cannot_be_mixed_are_refused_by_name():
  params = base("tied")
  path = "blocks/attention/query/weight"
  fits = adapter_of(adapted(params, "narrow"))
  spoiled = fits | {path: dataclasses.replace(fits[path], b=fits[path].b.at[0, 0, 0].set(jnp.nan))}
  other = {path: dataclasses.replace(fits[path], a=fits[path].a[:, :16])}
  experts = ModelConfig(**SIZES, moe=MoEConfig(num_experts=2, mlp_dim=16, top_k=1))
  latent = MLAConfig(kv_lora_rank=16, nope_head_dim=8, rope_head_dim=8, value_head_dim=8)
  latents = ModelConfig(**SIZES | {"num_kv_heads": 4}, mla=latent)
  absorbed = {path.replace("query", "key"): fits[path]}
  for config, adapter, message in (
    (CONFIGS["tied"], spoiled, f"'x' has numbers of {path} that are not finite in float32"),
    (CONFIGS["tied"], other, rf"'x' does not fit: {path} is \[32, 32\] here and \[16, 32\] in the adapter"),
    (CONFIGS["tied"], {"head/weight": fits[path]}, "'x' does not fit: the model has no head/weight"),
    (CONFIGS["tied"], {}, "'x' changes nothing"),
    (experts, {"blocks/moe/up/weight": fits[path]}, "'x' does not fit: blocks/moe/up/weight is of experts"),
    (latents, absorbed, "'x' changes blocks/attention/key/weight, which a cache of latents"),
  ):
    with pytest.raises(ConfigError, match=message):
      Engine(config, oracle.random_params(config), compute=oracle.XLA, adapters={"x": adapter}, **harness.SMALL)
