"""What settings do to whole completions, against plain loops over the uncached logits."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_models as tiny

from jaxllm.base.errors import ConfigError, DataError
from jaxllm.inference.model import Model
from jaxllm.inference.params import SamplingParams

PROMPT = list(b"abcabcab")
NEW = 14
FEW = list(range(97, 104))  # so few tokens that they come again
SETTINGS = [
  dict(),
  dict(repetition_penalty=3.0),
  dict(no_repeat_ngram_size=2),
  dict(presence_penalty=1.5, frequency_penalty=1.0),
  dict(logit_bias={101: -9.0, 99: 3.5}, sequence_bias={(99, 98): 20.0}),
  dict(bad_words_ids=[[97], [101, 101], [102, 103], [103, 101, 103]]),
  dict(forced_bos_token_id=5, forced_eos_token_id=6),
]


def changed(settings, logits, ids):
  """The rules in NumPy, of one position."""
  s, out, drawn = settings, logits.astype(np.float64), ids[len(PROMPT) :]
  for token, bias in (s.logit_bias or {}).items():
    out[token] += bias
  for sequence, bias in (s.sequence_bias or {}).items():
    out[sequence[-1]] += bias if tuple(ids[1 - len(sequence) :]) == sequence[:-1] else 0
  for token in set(ids):
    out[token] *= s.repetition_penalty if out[token] < 0 else 1 / s.repetition_penalty
  for token in set(drawn):
    out[token] -= s.presence_penalty + s.frequency_penalty * drawn.count(token)
  n = s.no_repeat_ngram_size
  for i in range(len(ids) - n + 1) if n else ():
    if ids[i : i + n - 1] == ids[len(ids) - n + 1 :]:
      out[ids[i + n - 1]] = -np.inf
  for banned in s.bad_words_ids:
    if len(banned) == 1 or tuple(ids[1 - len(banned) :]) == banned[:-1]:
      out[banned[-1]] = -np.inf
  if s.allowed_token_ids is not None:
    out[[i for i in range(len(out)) if i not in s.allowed_token_ids]] = -np.inf
  return out


def plain_loop(model, settings):
  ids = list(PROMPT)
  for place in range(NEW):
    forced = {0: settings.forced_bos_token_id, NEW - 1: settings.forced_eos_token_id}.get(place)
    logits = np.asarray(model(np.asarray([ids]))[0, -1])
    ids.append(int(changed(settings, logits, ids).argmax()) if forced is None else forced)
  return tuple(ids[len(PROMPT) :])


def test_greedy_texts_with_mixed_settings_are_those_of_plain_loops():
  model = tiny.loose_model()
  usual = dict(temperature=0, max_tokens=NEW, ignore_eos=True, allowed_token_ids=FEW)
  each = [SamplingParams(**usual, **one) for one in SETTINGS]
  together = model.generate([PROMPT] * len(each), each)
  want = [plain_loop(model, one) for one in each]
  assert [one.token_ids for one in together] == want
  assert len(set(want)) == len(want)  # else a setting does nothing
  assert [model.generate(PROMPT, one)[0].token_ids for one in each[:2]] == want[:2]


def free(model, **settings):
  return model.generate(PROMPT, temperature=0, max_tokens=NEW, ignore_eos=True, **settings)[0]


def test_nothing_ends_before_min_tokens():
  model = tiny.loose_model()
  end = free(model).token_ids[1]
  settings = dict(temperature=0, max_tokens=NEW, ignore_eos=True, stop_token_ids=[end])
  early = model.generate(PROMPT, **settings)[0]
  late = model.generate(PROMPT, min_tokens=5, **settings)[0]
  assert len(early.token_ids) <= 2 and len(late.token_ids) > 5 and end not in late.token_ids[:5]
  assert late.token_ids == model.generate(PROMPT, min_length=len(PROMPT) + 5, **settings)[0].token_ids
  assert len(model.generate(PROMPT, temperature=0, max_length=len(PROMPT) + 3, max_tokens=None)[0].token_ids) == 3
  with pytest.raises(ConfigError, match="has 8 tokens and max_length is 8"):
    model.generate(PROMPT, max_length=8)


def test_what_stopped_a_text_can_be_part_of_it():
  model = tiny.loose_model()
  whole = free(model)
  stop = whole.text[4:6]
  cut = free(model, stop=stop, include_stop_str_in_output=True)
  assert cut.text == whole.text[: whole.text.find(stop) + len(stop)] and cut.stop_reason == stop
  end = whole.token_ids[3]
  cut = free(model, stop_token_ids=[end], include_stop_str_in_output=True)
  assert cut.text == model.tokenizer.decode(whole.token_ids[: whole.token_ids.index(end) + 1])


def test_special_tokens_are_shown_on_request():
  model = tiny.loose_model()
  settings = dict(allowed_token_ids=[tiny.BOS, 97], logit_bias={tiny.BOS: 1e4}, max_tokens=2, temperature=0)
  assert model.generate(PROMPT, **settings)[0].text == ""
  assert model.generate(PROMPT, skip_special_tokens=False, **settings)[0].text == "<bos><bos>"


def test_bad_words_are_not_written():
  model = tiny.loose_model()
  whole = free(model)
  text = whole.text.encode()[2:4].decode("utf-8", "ignore") or whole.text[2]
  assert text in whole.text and text not in free(model, bad_words=[text]).text
  with pytest.raises(ConfigError, match="bad_words need a tokenizer"):
    Model(model.config, model.params).generate([PROMPT], bad_words=["x"])


def test_best_of_gives_the_likeliest():
  model = tiny.loose_model()
  settings = SamplingParams(n=5, seed=2, temperature=1.5, max_tokens=6, logprobs=0)
  every = model.generate(["ab", "c"], settings)
  best = model.generate(["ab", "c"], dataclasses.replace(settings, n=2, best_of=5, logprobs=None))
  for prompt in range(2):
    ranked = sorted(every[prompt * 5 :][:5], key=lambda one: -one.cumulative_logprob)
    assert [one.token_ids for one in best[prompt * 2 :][:2]] == [one.token_ids for one in ranked[:2]]
  assert [(one.prompt_index, one.index) for one in best] == [(0, 0), (0, 1), (1, 0), (1, 1)]
  assert best[0].logprobs is None and [delta.index for delta in model.stream("ab", n=1, best_of=3)] == [0]


def test_no_token_left_is_one_clear_error():
  model = tiny.loose_model()
  with pytest.raises(DataError, match="no token can be drawn at position 8: its settings leave none"):
    model.generate(PROMPT, allowed_token_ids=[97], no_repeat_ngram_size=1)
  with pytest.raises(ConfigError, match="logit_bias names token 258"):
    model.generate(PROMPT, logit_bias={258: 1.0})
  with pytest.raises(ConfigError, match="prompt_logprobs"):
    model.generate(PROMPT, prompt_logprobs=1)


def test_the_models_file_changes_its_texts(tmp_path):
  tiny.save(tmp_path / "m")
  others = [i for i in range(258) if i not in FEW]
  written = dict(do_sample=False, repetition_penalty=3.0, suppress_tokens=others, max_new_tokens=NEW, eos_token_id=[])
  (tmp_path / "m" / "generation_config.json").write_text(json.dumps(written))
  (tmp_path / "m" / "jaxllm_manifest.json").unlink(missing_ok=True)  # it is meant
  from jaxllm.inference.load import load_model

  model = load_model(tmp_path / "m")
  want = [plain_loop(model, SamplingParams(allowed_token_ids=FEW, repetition_penalty=r)) for r in (3.0, 1.0)]
  assert [model.generate(PROMPT, **one)[0].token_ids for one in ({}, dict(repetition_penalty=1.0))] == want
  assert want[0] != want[1]
