"""The engine against the plain loop over whole sequences, without a cache."""

import dataclasses
import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny_models as tiny
from harness import Poisoned, greedy, serve

from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine import Engine, Request
from jaxllm.inference.params import SamplingParams
from jaxllm.inference.sampling import sampling_rows
from jaxllm.kernels import cpu_ffi, cpu_layers
from jaxllm.models.build import unstack_layers
from jaxllm.models.config import AdapterConfig, Compute, ModelConfig
from jaxllm.models.parts import MLAConfig, MoEConfig
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh

PROMPTS = [[7], [3, 1, 4, 1, 5], list(range(40, 55)), list(range(60, 76)), list(range(80, 97))]
KINDS = {
  "sinks": dict(attention_sinks=True, attention_softcap=1.0, sliding_window=3, layer_pattern=("local", "global")),
  "sink-tokens": dict(sink_tokens=2, sliding_window=3),
  "relative": dict(position="relative", relative_buckets=8, relative_max_distance=12),
  "window": dict(sliding_window=5, layer_pattern=("local", "global"), tie_embeddings=False),
  "virtual-tokens": dict(adapter=AdapterConfig(prefix_len=3)),
  "plain": dict(),
}


@functools.cache
def model(kind="plain", seed=0):
  """(config, params) with every weight random."""
  sizes = dict(vocab_size=101, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48, max_seq_len=48)
  config = ModelConfig(**sizes, **KINDS[kind])
  return config, unstack_layers(oracle.random_params(config, seed))


@functools.cache
def engine(kind="plain"):
  """One engine for many tests, without a request in it between them."""
  return Poisoned(*model(kind), compute=oracle.XLA, num_pages=12)


@functools.cache
def log_probs(kind, tokens, seed=0):
  """Log-probabilities [T, V] after each of the tokens."""
  config, params = model(kind, seed)
  padded = np.zeros((1, config.max_seq_len), np.int32)
  padded[0, : len(tokens)] = tokens
  return np.asarray(jax.nn.log_softmax(oracle.forward(config)(params, padded)))[0, : len(tokens)]


def plain_loop(kind, prompt, count, seed=0, choose=None):
  """Tokens drawn one by one, each after a forward pass over all before; the likeliest, or what `choose` says."""
  ids = list(prompt)
  for _ in range(count):
    after = log_probs(kind, tuple(ids), seed)[-1]
    ids.append(int(after.argmax() if choose is None else choose(after, len(ids))))
  return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_any_mix_is_the_plain_loop(kind):
  prompts = [[token % 101 for token in prompt] for prompt in PROMPTS]
  want = [plain_loop(kind, prompt, 10) for prompt in prompts]
  served = engine(kind)
  before = served.stats()["preemptions"]
  assert serve(served, map(greedy, prompts), waits=(0, 0, 3, 1)) == want
  assert serve(served, [greedy(prompt) for prompt in prompts[::-1]]) == want[::-1]
  assert served.stats()["preemptions"] > before or kind == "sink-tokens"


def test_a_row_that_draws_computes_one_token_a_step(monkeypatch):
  """Also while the step before is under way: nothing is computed twice."""
  from jaxllm.inference.engine import engine as module

  counts, arrange = [], module.arrange
  note = lambda plan, *rest: counts.append([work.count for work in plan.work]) or arrange(plan, *rest)  # noqa: E731
  monkeypatch.setattr(module, "arrange", note)
  serve(engine(), [greedy([1, 2, 3, 4, 5], 6)])
  assert counts[0] == [5] and all(count == [1] for count in counts[1:]) and 6 <= len(counts) <= 7


def test_all_layers_in_one_call_are_the_plain_loop(monkeypatch):
  """The C++ step of all layers, for tokens of several rows and for a row's own at once."""
  if not cpu_ffi.available():
    pytest.skip("needs the C++ kernels")
  calls, run = [], cpu_layers.run
  monkeypatch.setattr(cpu_layers, "run", lambda x, *rest, **how: calls.append(len(x)) or run(x, *rest, **how))
  monkeypatch.setitem(KINDS, "wide", dict(head_dim=16))
  config, params = model("wide")
  served = Poisoned(config, params, compute=Compute(), num_pages=12)
  prompts = [[token % 101 for token in prompt] for prompt in PROMPTS]
  assert serve(served, map(greedy, prompts), waits=(0, 0, 3, 1)) == [plain_loop("wide", p, 10) for p in prompts]
  assert set(calls) == {3, 12}


def test_hit_equals_miss():
  """Of four requests with a beginning in common the later ones read little of it, and draw the same."""
  served, shared = engine(), list(range(50, 63))
  prompts = [[*shared, 1, 2], [*shared, 3], shared, shared]
  want = [plain_loop("plain", prompt, 10) for prompt in prompts]
  before = served.stats()["prefix_hits"]
  for prompt, tokens in zip(prompts, want):
    assert serve(served, [greedy(prompt)]) == [tokens]
  assert served.stats()["prefix_hits"] - before == 3 * 12
  before = served.stats()["prefix_hits"]
  assert serve(served, [Request(shared, greedy([1]).sampling, salt="mine")]) == [want[2]]
  assert served.stats()["prefix_hits"] == before


def test_what_is_drawn_depends_on_seed_and_index_alone():
  settings = [SamplingParams(seed=i // 2, max_tokens=10, temperature=1.0 + i / 4, top_p=0.9) for i in range(5)]
  requests = [Request(prompt, one, index=i) for i, (prompt, one) in enumerate(zip(PROMPTS, settings))]
  together = serve(engine(), requests, waits=(0, 1, 0, 2))
  assert engine().stats()["preemptions"] > 0

  def choose(i, after, position):
    logits = jnp.asarray(after)[None]  # the noise is the sampler's, added to logits that no cache has seen
    facts = dict(begins=[0], limits=[0], ends=[()], vocab_size=101)
    return sampling_rows([settings[i]], [i], **facts).draw(logits, jnp.asarray([position]), jnp.zeros((1, 1), int))[0]

  for i in (1, 3):
    assert together[i] == plain_loop("plain", PROMPTS[i], 10, choose=functools.partial(choose, i))
    assert serve(engine(), [requests[i]]) == [together[i]]


def test_without_overlap_the_same():
  config, params = model()
  one = Poisoned(config, params, compute=oracle.XLA, num_pages=12, overlap=False)
  found = {}
  number = one.submit(greedy(PROMPTS[1], 3))
  harness.collect(one.step(), found)
  assert len(found[number]) == 1  # what the step has drawn, at once
  one.abort(number)
  one.step()
  assert serve(one, map(greedy, PROMPTS)) == serve(engine(), map(greedy, PROMPTS))


def test_log_probabilities_are_the_models():
  sampling = SamplingParams(temperature=0.7, seed=5, max_tokens=8, logprobs=3, prompt_logprobs=2, ignore_eos=True)
  requests = [Request(prompt, sampling) for prompt in PROMPTS]
  served, found = engine(), {}
  numbers = [served.submit(request) for request in requests]
  while served.busy:
    harness.collect(served.step(), found)
  assert served.stats()["preemptions"] > 0
  for number, prompt in zip(numbers, PROMPTS):
    drawn = [token for delta in found[number] for token in delta.token_ids]
    shown = [one for delta in found[number] for one in delta.logprobs or ()]
    read = [one for delta in found[number] for one in delta.prompt_logprobs or ()]
    want = log_probs("plain", (*prompt, *drawn))
    assert (len(shown), len(read)) == (8, len(prompt) - 1)
    for top, entries, first, tokens in ((3, shown, len(prompt), drawn), (2, read, 1, prompt[1:])):
      for i, (entry, token) in enumerate(zip(entries, tokens)):
        after = want[first + i - 1]
        assert set(entry) == {token, *np.argsort(-after)[:top].tolist()}
        np.testing.assert_allclose([entry[t] for t in entry], after[list(entry)], atol=1e-4)


def test_score():
  served, other = engine(), greedy(PROMPTS[3])
  number = served.submit(other)
  texts = [*PROMPTS, PROMPTS[2]]
  scores = served.score(texts)
  for text, score in zip(texts, scores, strict=True):
    want = log_probs("plain", tuple(text))[np.arange(len(text) - 1), text[1:]]
    np.testing.assert_allclose(score, want, atol=1e-4)
  found = {}
  while served.busy:
    harness.collect(served.step(), found)
  assert found.keys() == {number}
  assert [t for delta in found[number] for t in delta.token_ids] == plain_loop("plain", PROMPTS[3], 10)
  with pytest.raises(ConfigError, match="holds token 101"):
    served.score([[1, 2], [101]])
  assert not served.busy and served.stats()["pages_free"] == served.stats()["pages_total"]


def test_how_a_completion_ends():
  free = plain_loop("plain", PROMPTS[1], 10)
  served, found = engine(), {}
  requests = [
    greedy(PROMPTS[1], 2),
    greedy(PROMPTS[1], stop_token_ids=[free[3]]),
    Request(PROMPTS[1], SamplingParams(temperature=0, max_tokens=None), eos_ids=[free[5]]),
    greedy([5] * 40, None),  # to the model's end
  ]
  numbers = [served.submit(request) for request in requests]
  while served.busy:
    harness.collect(served.step(), found)
  drawn = [[token for delta in found[number] for token in delta.token_ids] for number in numbers]
  assert drawn[:3] == [free[:2], free[: free.index(free[3]) + 1], free[: free.index(free[5]) + 1]]
  assert len(drawn[3]) == 8
  ends = [(found[number][-1].finish_reason, found[number][-1].stop_reason) for number in numbers]
  assert ends == [("length", None), ("stop", free[3]), ("stop", None), ("length", None)]


def test_abort_at_any_time():
  served, found = engine(), {}
  want = plain_loop("plain", PROMPTS[4], 10)
  for wait in range(6):
    gone, stays, waits, more = (served.submit(greedy(PROMPTS[4])) for _ in range(4))
    for _ in range(wait):
      harness.collect(served.step(), found)
    for number in (gone, more, gone, 10**9):
      harness.collect(filter(None, [served.abort(number)]), found)
    while served.busy:
      harness.collect(served.step(), found)
    for number in (gone, more):
      drawn = [token for delta in found[number] for token in delta.token_ids]
      assert found[number][-1].finish_reason == "abort" and drawn == want[: len(drawn)]
    for number in (stays, waits):
      assert [token for delta in found[number] for token in delta.token_ids] == want
    assert served.stats()["pages_free"] == served.stats()["pages_total"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("program, when", [("begin", 1), ("step", 1), ("step", 4)])
def test_interrupted_in_the_middle_of_a_step(monkeypatch, program, when, after):
  """Before or after a program has run: rows lose nothing, and pages that were not written are not found."""
  served, found, calls = Poisoned(*model(), compute=oracle.XLA, num_pages=12), {}, []
  run = getattr(served._programs, program)

  def interrupted(*arguments):
    calls.append(1)
    result = run(*arguments) if after or len(calls) != when else None
    if len(calls) == when:
      raise KeyboardInterrupt
    return result

  monkeypatch.setattr(served._programs, program, interrupted)
  numbers = [served.submit(greedy(prompt)) for prompt in PROMPTS[2:]]
  while served.busy:
    try:
      harness.collect(served.step(), found)
    except KeyboardInterrupt:
      gone = numbers.pop()
      served.abort(gone)
  assert gone not in numbers and len(numbers) == 2
  want = [plain_loop("plain", prompt, 10) for prompt in PROMPTS[2:]]
  for number, tokens in zip(numbers, want):
    assert [token for delta in found[number] for token in delta.token_ids] == tokens
  assert serve(served, map(greedy, PROMPTS[2:])) == want


def test_an_interrupted_score_leaves_nothing(monkeypatch):
  served, found = engine(), {}
  number = served.submit(greedy(PROMPTS[3]))
  served.step()
  step, calls = served.step, []

  def third():
    calls.append(1)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return step()

  monkeypatch.setattr(served, "step", third)
  with pytest.raises(KeyboardInterrupt):
    served.score([PROMPTS[4]])
  monkeypatch.setattr(served, "step", step)
  while served.busy:
    harness.collect(served.step(), found)
  assert list(found) == [number]
  assert [token for delta in found[number] for token in delta.token_ids] == plain_loop("plain", PROMPTS[3], 10)
  assert served.stats()["pages_free"] == served.stats()["pages_total"]


def test_new_weights():
  """Text goes on as the new weights say, from what was drawn before; pages of the old ones are not found."""
  config, params = model()
  served, found = Poisoned(config, params, compute=oracle.XLA, num_pages=12), {}
  numbers = [served.submit(greedy(prompt)) for prompt in PROMPTS[:4]]
  for _ in range(6):
    harness.collect(served.step(), found)
  served.load_weights(model(seed=1)[1], "1")
  harness.collect(served._early, before := {n: list(deltas) for n, deltas in found.items()})
  middle = {n: sum(len(delta.token_ids) for delta in before.get(n, ())) for n in numbers}
  hits = served.stats()["prefix_hits"]
  while served.busy:
    harness.collect(served.step(), found)
  for number, prompt in zip(numbers, PROMPTS):
    drawn = [token for delta in found[number] for token in delta.token_ids]
    old = drawn[: middle[number]]
    assert old == plain_loop("plain", prompt, len(old))
    assert drawn[len(old) :] == plain_loop("plain", [*prompt, *old], 10 - len(old), seed=1)
  assert any(middle.values()) and served.stats()["prefix_hits"] == hits
  assert serve(served, [greedy(PROMPTS[4])]) == [plain_loop("plain", PROMPTS[4], 10, seed=1)]


def test_new_weights_of_another_model_are_refused():
  """Before anything changes: the requests that run go on as they were."""
  config, params = model()
  served = Poisoned(config, params, compute=oracle.XLA, num_pages=12)
  numbers, found = [served.submit(greedy(prompt)) for prompt in PROMPTS[:2]], {}
  harness.collect(served.step(), found)
  wider = dataclasses.replace(config, mlp_dim=2 * config.mlp_dim)
  other = dataclasses.replace(config, tie_embeddings=not config.tie_embeddings)
  for wrong, said in ((wider, "other shapes"), (other, "another model")):
    with pytest.raises(ConfigError, match=said):
      served.load_weights(oracle.random_params(wrong), "1")
  while served.busy:
    harness.collect(served.step(), found)
  for number, prompt in zip(numbers, PROMPTS):
    assert [t for delta in found[number] for t in delta.token_ids] == plain_loop("plain", prompt, 10)


def test_logits_that_are_no_numbers_end_their_request_only():
  config, params = model("window")
  table = params["embedding"]["tokens"]
  broken = params | {"embedding": params["embedding"] | {"tokens": jnp.asarray(table).at[100].set(jnp.nan)}}
  served, found = Poisoned(config, broken, compute=oracle.XLA, num_pages=12), {}
  numbers = [served.submit(greedy(prompt)) for prompt in (PROMPTS[2], [*PROMPTS[2], 100], PROMPTS[4])]
  while served.busy:
    harness.collect(served.step(), found)
  last = found[numbers[1]][-1]
  assert (last.finish_reason, last.token_ids) == ("error", ()) and "logits are not finite" in last.error
  for number, prompt in ((numbers[0], PROMPTS[2]), (numbers[2], PROMPTS[4])):
    assert [token for delta in found[number] for token in delta.token_ids] == plain_loop("window", prompt, 10)
  assert serve(served, [greedy(PROMPTS[2])]) == [plain_loop("window", PROMPTS[2], 10)]


def test_everything_is_compiled_at_the_start():
  config, params = model()
  served = Engine(config, params, max_num_seqs=3, page_size=4, max_tokens_per_step=20, max_logprobs=0, num_pages=30)
  served.warm_up()
  count = served.stats()["compilations"]
  assert count == 3 + 2 + 1  # 1, 2 and 3 rows that draw; 16 and 20 tokens; a row's beginning
  for n in range(1, 5):
    serve(served, map(greedy, PROMPTS[:n]))
    serve(served, [greedy(PROMPTS[0], 3, seed=1, temperature=1.0)] * n)
  served.score(PROMPTS)
  assert served.stats()["compilations"] == count


@pytest.mark.parametrize("sizes", [dict(data=1, tensor=2), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_on_a_mesh(sizes):
  config, params = model("sinks")
  config = ModelConfig(**{f: getattr(config, f) for f in config.__dataclass_fields__} | {"vocab_size": 104})
  params = oracle.random_params(config)
  served = Poisoned(config, params, compute=oracle.XLA, mesh=make_mesh(MeshConfig(**sizes)), num_pages=12)
  alone = Poisoned(config, params, compute=oracle.XLA, num_pages=12)
  assert serve(served, map(greedy, PROMPTS)) == serve(alone, map(greedy, PROMPTS))
  pages = served._state.layers[0].pages.keys
  assert pages.sharding.shard_shape(pages.shape) == (13, 1, 4, 8)


MIXTURES = {
  "experts": dict(moe=MoEConfig(num_experts=8, mlp_dim=16, bias=True)),
  "latent": dict(
    moe=MoEConfig(num_experts=8, mlp_dim=16, shared_mlp_dim=16, first_dense_layers=1, num_groups=4, top_groups=2),
    mla=MLAConfig(kv_lora_rank=16, q_lora_rank=16, nope_head_dim=8, rope_head_dim=4, value_head_dim=8),
  ),
}


@pytest.mark.parametrize("axis", ["fsdp", "expert"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_on_a_mesh(kind, axis):
  """The tokens of a step are whole on all devices, wherever the experts' matrices lie."""
  config = ModelConfig(vocab_size=104, embed_dim=32, num_layers=2, num_heads=4, max_seq_len=48, **MIXTURES[kind])
  params = unstack_layers(oracle.random_params(config))
  mesh = make_mesh(MeshConfig(data=1, tensor=2, **{axis: 2}), jax.devices()[:4])
  served = Poisoned(config, params, compute=oracle.XLA, mesh=mesh, num_pages=12)
  alone = Poisoned(config, params, compute=oracle.XLA, num_pages=12)
  assert serve(served, map(greedy, PROMPTS)) == serve(alone, map(greedy, PROMPTS))


@pytest.mark.parametrize("dtype, kv_dtype", [("float32", "int8"), ("bfloat16", None)])
def test_other_dtypes_hold_what_they_can(dtype, kv_dtype):
  """Not token for token, but the log-probabilities are near."""
  config, params = model()
  served = Engine(config, params, compute=Compute(dtype=dtype, attention="xla"), kv_dtype=kv_dtype, **harness.SMALL)
  errors = []
  for text, score in zip(PROMPTS, served.score(PROMPTS)):
    want = log_probs("plain", tuple(text))[np.arange(len(text) - 1), text[1:]]
    errors += np.abs(score - want).tolist()
  assert 1e-4 < max(errors) < 0.5


@pytest.mark.parametrize(
  "request_, message",
  [
    (Request([]), "the prompt is empty"),
    (Request([1] * 48), "the prompt has 48 tokens, and there is room for 47 .max_model_len 48"),
    (Request([1, 101]), "holds token 101.*101 tokens"),
    (Request([-1]), "holds token -1"),
    (greedy([1] * 30, 20), "30 tokens and up to 18 more need 12 global pages of 4 tokens, and there are 11"),
    (greedy([1], logprobs=4), "logprobs is 4; this engine gives up to 3"),
    (greedy([1], prompt_logprobs=4), "prompt_logprobs is 4"),
    (greedy([1], num_beams=2), "num_beams"),
  ],
)
def test_what_can_never_be_served_is_refused(request_, message):
  served = Engine(*model(), num_pages=11, **harness.SMALL)
  with pytest.raises(ConfigError, match=message):
    served.submit(request_)
  assert not served.busy


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(max_model_len=49), "max_model_len is 49; it must be at least 1 and at most 48"),
    (dict(max_tokens_per_step=2), "max_tokens_per_step is 2; each of max_num_seqs = 3"),
    (dict(num_pages=0), "num_pages is 0"),
    (dict(page_size=0), "page_size is 0"),
    (dict(num_pages={"local": 9}), "it must be at least 1 of each kind: global"),
    (dict(max_logprobs=-1), "max_logprobs is -1; it must be at least 0"),
    (dict(max_logprobs=1.5), "max_logprobs is 1.5; it must be a whole number"),
    (dict(max_biases=(0, 8)), "max_biases is 0; it must be at least 1"),
    (dict(max_biases=300), "max_biases is 300; it must be two numbers"),
    (dict(row_buckets=(0, 3)), "row_buckets is 0; it must be at least 1"),
    (dict(token_buckets=("12",)), "token_buckets is '12'; it must be a whole number"),
  ],
)
def test_impossible_sizes(settings, message):
  with pytest.raises(ConfigError, match=message):
    Engine(*model(), **harness.SMALL | settings)


def test_a_loaded_model_lends_its_weights():
  loaded = tiny.loose_model()
  served = Engine.of(loaded, **harness.SMALL)
  want = loaded.generate([PROMPTS[1]], temperature=0, max_tokens=5, ignore_eos=True)[0].token_ids
  assert serve(served, [greedy(PROMPTS[1], 5)]) == [list(want)]
  shared = zip(jax.tree.leaves(served._params), jax.tree.leaves(loaded._weights))
  assert all(a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer() for a, b in shared)


def test_a_model_without_a_head_for_text():
  config = ModelConfig(vocab_size=9, embed_dim=8, num_layers=1, num_heads=1, architecture="encoder")
  with pytest.raises(ConfigError, match="no head that writes text"):
    Engine(config, {})
