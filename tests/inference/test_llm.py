"""`LLM` in vLLM's shape, on a tiny model that is saved and loaded."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny_models as tiny
from chat_tokenizer import chat_tokenizer

import jaxllm
from jaxllm import LLM, SamplingParams
from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine import Request
from jaxllm.inference.model import Model
from jaxllm.kernels import QuantizedWeight, dequantize, quantize
from jaxllm.models.build import stack_layers
from jaxllm.models.weights import dense

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SIZES = dict(max_model_len=40, max_num_seqs=3, page_size=4, num_pages=24, dtype="float32", compile_at_start=False)
SIZES |= dict(compiler_options={"xla_backend_optimization_level": 0}, row_buckets=(3,), token_buckets=(12,))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp("models") / "tiny"
  tiny.save(directory)
  return directory


@pytest.fixture(scope="module")
def llm(saved):
  return LLM(saved, max_num_batched_tokens=12, **SIZES)


@pytest.fixture(scope="module")
def model(saved):
  return jaxllm.load_model(saved)


def plain_loop(model, prompt, count):
  ids = list(prompt)
  for _ in range(count):
    padded = np.zeros((1, 48), np.int32)
    padded[0, : len(ids)] = ids
    ids.append(int(np.asarray(model(padded))[0, len(ids) - 1].argmax()))
  return tuple(ids[len(prompt) :])


def test_prompts_of_every_form(llm, model):
  ids = model.prompt_ids("abcdef")
  forms = [
    "abcdef",
    ids,
    {"prompt": "abcdef"},
    {"prompt_token_ids": ids},
    {"prompt": "abcdef", "prompt_token_ids": ids},
  ]
  answers = llm.generate(forms, GREEDY)
  want = plain_loop(model, ids, 8)
  for answer, text in zip(answers, ["abcdef", None, "abcdef", None, "abcdef"], strict=True):
    assert answer.outputs[0].token_ids == want and answer.prompt_token_ids == tuple(ids)
    assert (answer.prompt, answer.finished, answer.outputs[0].finish_reason) == (text, True, "length")
  assert llm.generate("abcdef", GREEDY)[0].outputs[0].text == answers[0].outputs[0].text
  assert llm.generate(ids, GREEDY)[0].outputs[0].token_ids == want
  assert llm.generate([], GREEDY) == []
  stats = llm.stats()
  assert stats["pages_free"] == stats["pages_total"] == 24 and stats["prefix_hits"] > 0


def test_log_probabilities(llm, model):
  wants = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1)
  answer = llm.generate("abcdef", wants)[0]
  ids = [*answer.prompt_token_ids, *answer.outputs[0].token_ids]
  logits = np.asarray(model(np.asarray([ids])))[0].astype(np.float64)
  after = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  n = len(answer.prompt_token_ids)
  assert answer.prompt_logprobs[0] is None and len(answer.prompt_logprobs) == n
  for i, shown in enumerate([*answer.prompt_logprobs, *answer.outputs[0].logprobs]):
    for token, found in (shown or {}).items():
      assert found.logprob == pytest.approx(after[i - 1, token], abs=1e-4)
      assert found.rank == 1 + (after[i - 1] > after[i - 1, token]).sum()
      assert i == 0 or found.decoded_token == model.tokenizer.decode([token])
    assert i == 0 or ids[i] in shown
  want = sum(after[n - 1 + i, token] for i, token in enumerate(answer.outputs[0].token_ids))
  assert answer.outputs[0].cumulative_logprob == pytest.approx(want, abs=1e-3)
  scores = llm.score("abcdef")[0]
  np.testing.assert_allclose(scores, [after[i - 1, ids[i]] for i in range(1, n)], atol=1e-4)


def test_same_seed_same_text_whatever_else_is_there(llm):
  settings = SamplingParams(temperature=1.5, seed=3, n=2, max_tokens=8, ignore_eos=True)
  alone = llm.generate("abc", settings)[0]
  assert alone.outputs[0].token_ids != alone.outputs[1].token_ids
  others = [SamplingParams(temperature=1.0, max_tokens=9)] * 3
  among = llm.generate(["x", "yy", "abc", "zzzzz"], [*others[:2], settings, *others[2:]])[2]
  assert among.outputs == alone.outputs


def test_of_many_the_likeliest(llm):
  settings = dict(temperature=1.5, seed=3, max_tokens=8, ignore_eos=True)
  drawn = llm.generate("abc", SamplingParams(n=4, logprobs=0, **settings))[0].outputs
  best = sorted(drawn, key=lambda one: -one.cumulative_logprob)[:2]
  found = llm.generate("abc", SamplingParams(n=2, best_of=4, **settings))[0].outputs
  assert [one.token_ids for one in found] == [one.token_ids for one in best]
  assert [one.index for one in found] == [0, 1]


def test_stop_strings(llm):
  free = llm.generate("abc", GREEDY)[0].outputs[0]
  stop = free.text[3:5]
  place = free.text.find(stop)
  ends = dict(temperature=0, max_tokens=8, ignore_eos=True, stop=[stop])
  one, other = llm.generate(
    ["abc", "abc"], [SamplingParams(**ends), SamplingParams(include_stop_str_in_output=True, **ends)]
  )
  assert (one.outputs[0].text, one.outputs[0].finish_reason) == (free.text[:place], "stop")
  assert one.outputs[0].stop_reason == stop and other.outputs[0].text == free.text[: place + len(stop)]
  assert one.metrics.target_steps == len(one.outputs[0].token_ids) < 8
  assert llm.stats()["running"] == 0


def test_guided(llm):
  pytest.importorskip("llguidance")
  choice = {"choice": ["yes", "no", "maybe"]}
  answers = llm.generate(
    ["abc", "de", "abc"],
    [SamplingParams(structured_outputs=choice, max_tokens=10, seed=i, temperature=1.0) for i in range(2)] + [GREEDY],
  )
  assert all(one.outputs[0].text in choice["choice"] for one in answers[:2])
  assert {one.outputs[0].finish_reason for one in answers[:2]} == {"stop"}
  assert answers[2].outputs == llm.generate("abc", GREEDY)[0].outputs


def test_a_bad_request_harms_no_other(llm, model):
  want = plain_loop(model, model.prompt_ids("abc"), 8)
  bad = [
    ([1] * 60, GREEDY, "60 tokens, and there is room for 39 .max_model_len 40"),
    ([], GREEDY, "empty"),
    ([1, 999], GREEDY, "holds token 999"),
    ("abc", SamplingParams(logprobs=21), "logprobs is 21"),
    ("abc", SamplingParams(structured_outputs={"regex": "("}), "structured_outputs"),
    ("abc", SamplingParams(stop_token_ids=[999]), "names token 999"),
    ("abc", SamplingParams(allowed_token_ids=[97], suppress_tokens=[97]), "settings leave none over"),
    ("abc", SamplingParams(num_beams=2, allowed_token_ids=[97], suppress_tokens=[97]), "settings leave none over"),
    ({"text": "abc"}, GREEDY, "a prompt of 'text'; it needs prompt_token_ids"),
  ]
  asked = [("abc", GREEDY), *[one[:2] for one in bad], ("abc", GREEDY)]
  answers = llm.generate([prompt for prompt, _ in asked], [settings for _, settings in asked])
  assert answers[0].outputs[0].token_ids == answers[-1].outputs[0].token_ids == want
  for answer, (prompt, settings, message) in zip(answers[1:-1], bad, strict=True):
    assert answer.outputs[0].finish_reason == "error" and answer.finished
    with pytest.raises(ConfigError, match=message):
      llm.generate([prompt], settings)
    assert answer.error is not None
  assert llm.stats()["pages_free"] == llm.stats()["pages_total"]


def test_several_threads_may_ask(llm):
  prompts = ["abc", "xyz", "q", "abcdefgh"]
  want = [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in prompts]
  scored = [llm.score(prompt)[0] for prompt in prompts]
  with ThreadPoolExecutor(4) as pool:
    answers = [pool.submit(llm.generate, prompt, GREEDY) for prompt in prompts * 3]
    scores = [pool.submit(llm.score, prompt) for prompt in prompts * 3]
    assert [one.result()[0].outputs[0].token_ids for one in answers] == want * 3
    for one, values in zip(scores, scored * 3):
      np.testing.assert_allclose(one.result()[0], values, atol=1e-5)


def test_a_pool_too_small_for_one_request(saved):
  few = LLM(saved, **{**SIZES, "num_pages": 4, "max_num_batched_tokens": 12})
  with pytest.raises(ConfigError, match="need 5 global pages of 4 tokens, and there are 4"):
    few.generate([[1] * 10], SamplingParams(temperature=0, max_tokens=8))
  assert few.generate([[1] * 5] * 3, GREEDY)[2].outputs[0].token_ids
  assert few.stats()["preemptions"] == 0 or few.stats()["pages_free"] == 4


def test_embeddings_are_the_models(llm, model):
  answers = llm.embed(["abc", "de"])
  np.testing.assert_allclose([one.outputs.embedding for one in answers], model.embed(["abc", "de"]), atol=1e-5)


def test_a_seed_for_all(saved):
  drawn = [LLM(saved, seed=1, **SIZES).generate(["abc", "abc"], SamplingParams(max_tokens=6)) for _ in range(2)]
  texts = [[one.outputs[0].token_ids for one in answers] for answers in drawn]
  assert texts[0] == texts[1] and texts[0][0] != texts[0][1]


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_speculation_changes_no_text(saved, llm, method):
  how = {"method": method, "num_speculative_tokens": 2, "adaptive": False}
  how |= {"model": str(saved)} if method == "draft" else {"prompt_lookup_min": 1}
  guessing = LLM(saved, speculative=how, **SIZES)
  sampled = SamplingParams(temperature=1.0, seed=2, max_tokens=12, ignore_eos=True)
  prompts = ["abcabcabc", "xyxyxy"]
  for settings in (GREEDY, sampled):
    found, want = guessing.generate(prompts, settings), llm.generate(prompts, settings)
    assert [one.outputs for one in found] == [one.outputs for one in want]
  assert guessing.stats()["draft_tokens"] > 0
  if method == "draft":  # of itself: every guess holds
    assert all(one.metrics.target_steps < 8 for one in found)


@pytest.mark.parametrize("format, bound", [("int8", 0.2), ("int4", 1.5), ("nf4", 1.5)])
def test_weights_of_fewer_bits(saved, llm, format, bound):
  """Every matrix of the layers is rounded, and the table that is the head as well."""
  small = LLM(saved, quantization=format, max_num_batched_tokens=12, **SIZES)
  want, rounded = llm.engine._params["blocks"], small.engine._params["blocks"]
  for name in ("query", "key", "value"):
    for layer in range(2):
      kept, codes = want["attention"][name]["weight"][layer], rounded["attention"][name]["weight"][layer]
      assert isinstance(codes, QuantizedWeight) and codes.format == format
      np.testing.assert_array_equal(dequantize(codes), dequantize(quantize(kept, format)))
  table = small.engine._params["embedding"]["tokens"]  # the head as well
  kept = llm.engine._params["embedding"]["tokens"]
  np.testing.assert_array_equal(dense(table), dequantize(quantize(kept.T, "int8")).T)
  a, b = llm.score("abcdefgh")[0], small.score("abcdefgh")[0]
  assert 0 < np.abs(a - b).max() < bound
  with pytest.raises(ConfigError, match="int3"):
    LLM(saved, quantization="int3", **SIZES)


def test_the_models_own_settings(saved, tmp_path):
  import shutil

  copy = shutil.copytree(saved, tmp_path / "copy")
  (copy / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "do_sample": False}))
  (copy / "jaxllm_manifest.json").unlink(missing_ok=True)  # it is meant
  llm = LLM(copy, **SIZES)
  assert llm.get_default_sampling_params() == SamplingParams(temperature=0, max_tokens=3)
  assert len(llm.generate("abc")[0].outputs[0].token_ids) <= 3


@pytest.mark.parametrize("sizes", [dict(tensor=2), dict(data=2), dict(data=3, tensor=2)], ids=str)
def test_over_several_devices_the_same(saved, llm, sizes):
  """Weights and pages are split over a replica's devices; requests go to all replicas."""
  prompts = [[3, 1, 4], [1, 5, 9, 2, 6], [5, 3], [5, 8, 9, 7], [9, 3, 2]]
  how = {f"{name}_parallel_size": size for name, size in sizes.items()}
  several = LLM(saved, max_num_batched_tokens=12, **how, **SIZES)
  drawn = [SamplingParams(temperature=1.0, seed=i, max_tokens=8, ignore_eos=True) for i in range(5)]
  for settings in (GREEDY, drawn):
    want, found = (one.generate(prompts, settings) for one in (llm, several))
    assert [one.outputs[0].token_ids for one in found] == [one.outputs[0].token_ids for one in want]
  for score, want in zip(several.score(prompts), llm.score(prompts)):
    np.testing.assert_allclose(score, want, atol=1e-5)
  data, tensor = sizes.get("data", 1), sizes.get("tensor", 1)
  engines = getattr(several.engine, "_engines", [several.engine])
  assert len(engines) == data and several.stats()["pages_total"] == data * 24
  assert all(engine.stats()["prefix_queries"] > 0 for engine in engines)
  places = {device for engine in engines for device in engine._state.tokens.devices()}
  assert len(places) == data * tensor
  number = several.engine.submit(Request(prompts[0], GREEDY))
  assert several.engine.abort(number).finish_reason == "abort" and several.engine.abort(number) is None
  several.engine.step()
  assert several.stats()["pages_free"] == several.stats()["pages_total"] and not several.engine.busy


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(max_model_len=49), "max_model_len is 49"),
    (dict(speculative="ngram"), "speculative is 'ngram'; it must be a dict"),
    (dict(kv_cache_dtype="int3"), "dtype of keys and values is 'int3'; choose one of float32"),
    (dict(seed=-1), "seed is -1"),
    (dict(page_size=2.5), "page_size is 2.5; it must be a whole number"),
    (dict(max_model_len="x"), "max_model_len is 'x'"),
    (dict(tensor_parallel_size=99), "tensor_parallel_size is 99"),
    (dict(tensor_parallel_size=0), "tensor_parallel_size is 0"),
    (dict(data_parallel_size=9), "data_parallel_size 9; there are 8"),
    (dict(speculative={"method": "eagle"}), "'ngram' or 'draft'"),
    (dict(speculative={"method": "draft"}), "needs a model"),
    (dict(speculative={"method": "ngram", "adaptive": "no"}), "speculative.adaptive is .no."),
    (dict(num_pages=0), "num_pages is 0"),
  ],
)
def test_impossible_settings(saved, settings, message):
  with pytest.raises(ConfigError, match=message):
    LLM(saved, **{**SIZES, **settings})


@pytest.mark.parametrize(
  "prompts, message",
  [
    (None, "prompts is a NoneType"),
    (b"abc", "prompts is a bytes"),
    ([[1.5, 2.0]], "the prompt holds 1.5, which is no token id"),
    ([1.0, 2.0], "the prompt holds 1.0, which is no token id"),
    ([[float("nan")]], "the prompt holds nan"),
    ([["a", "b"]], "the prompt holds 'a'"),
    ([[True]], "the prompt holds True"),
    ([[-1]], "the prompt holds token -1"),
    ([[2**70]], "holds token 1180591620717411303424"),
    ({"prompt": 3}, "the prompt is 3; it must be text"),
    ({"prompt_token_ids": "abc"}, "the prompt is 'abc'; it must be a list of token ids"),
    ("half \ud800", r"the prompt holds '\\ud800' at character 5: half of a character"),
  ],
)
def test_prompts_that_are_none(llm, prompts, message):
  with pytest.raises(ConfigError, match=message):
    llm.generate(prompts, GREEDY)
  assert llm.stats()["pages_free"] == llm.stats()["pages_total"]


@pytest.mark.parametrize("adapter, message", [(5, "adapter is 5"), ([5], "no adapter 5"), ("x", "no adapter 'x'")])
def test_adapters_that_are_none(llm, adapter, message):
  for ask in (lambda: llm.generate(["a"], GREEDY, adapter=adapter), lambda: llm.score(["ab"], adapter=adapter)):
    with pytest.raises(ConfigError, match=message):
      ask()


def test_an_interruption_among_the_questions_leaves_nothing(llm, monkeypatch):
  """Of three prompts the third is interrupted while it is read: the first two are not asked any more."""
  prompt_ids, read = llm.model.prompt_ids, []

  def interrupted(text):
    read.append(text)
    if len(read) == 3:
      raise KeyboardInterrupt
    return prompt_ids(text)

  monkeypatch.setattr(llm.model, "prompt_ids", interrupted)
  with pytest.raises(KeyboardInterrupt):
    llm.generate(["a", "b", "c"], GREEDY)
  stats = llm.stats()
  assert (stats["running"], stats["waiting"]) == (0, 0) and not llm._requests.busy


@pytest.mark.parametrize("settings", [{"temperature": 0}, [None], 5])
def test_sampling_settings_that_are_none(llm, settings):
  with pytest.raises(ConfigError, match="must be SamplingParams"):
    llm.generate(["a"], settings)


def test_a_chat_that_cannot_be_written_harms_no_other(tmp_path):
  _, params, config = tiny.model(vocab_size=259)
  Model(config, stack_layers(params), chat_tokenizer()).save(tmp_path / "chats")
  llm = LLM(tmp_path / "chats", max_num_batched_tokens=12, **SIZES)
  good, long = ([{"role": "user", "content": text}] for text in ("hi", "x" * 60))
  answers = llm.chat([good, long, [{"role": "user"}]], SamplingParams(temperature=0, max_tokens=2))
  want = llm.generate(llm.model.chat_ids(good), SamplingParams(temperature=0, max_tokens=2))
  assert llm.chat(good, SamplingParams(temperature=0, max_tokens=2))[0].outputs == want[0].outputs == answers[0].outputs
  assert "too many for the model's context" in answers[1].error and answers[2].error
  with pytest.raises(ConfigError, match="too many for the model's context"):
    llm.chat(long)


def test_beams_have_the_limits_of_the_engine(saved):
  llm = LLM(saved, max_model_len=16, num_pages=24, page_size=4, max_num_seqs=2, compile_at_start=False)
  beams = dict(num_beams=2, temperature=0, ignore_eos=True)
  done, long, shown = llm.generate(
    ["abc", "a" * 16, "abc"],
    [SamplingParams(**beams), SamplingParams(**beams), SamplingParams(prompt_logprobs=0, **beams)],
  )
  assert len(done.prompt_token_ids) + len(done.outputs[0].token_ids) == 16
  assert "max_model_len 16" in long.error and "no prompt_logprobs" in shown.error


def test_all_of_a_batch_invariant_llm_computes_so(saved):
  llm = LLM(
    saved, batch_invariant=True, max_model_len=16, num_pages=24, page_size=4, max_num_seqs=2, compile_at_start=False
  )
  assert llm.model.compute.batch_invariant and llm.engine.compute.batch_invariant
  assert llm.model._generator._compute.batch_invariant
