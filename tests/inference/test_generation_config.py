"""generation_config.json as default settings: every name that transformers knows is one of ours, or is said."""

import json
import logging
import re

import pytest
import tiny_models as tiny

from jaxllm.base.digests import seal
from jaxllm.base.errors import ConfigError
from jaxllm.inference import generation_config as tables
from jaxllm.inference.generation_config import default_sampling, default_settings
from jaxllm.inference.load import load_model
from jaxllm.inference.params import SamplingParams

GROUPS = (tables.SETTINGS, tables.READ_HERE, tables.READ_ELSEWHERE, tables.CHANGES_NO_TEXT, tables.NOT_HONOURED)


def test_every_field_of_transformers_stands_in_one_table():
  transformers = pytest.importorskip("transformers")
  names = set(vars(transformers.GenerationConfig())) - {"_original_object_hash"}
  assert len(names) > 60
  assert {name for name in names if sum(name in group for group in GROUPS) != 1} == set()


def test_what_transformers_does_by_default_is_not_said():
  """A file that names transformers' own defaults loads without a word."""
  transformers = pytest.importorskip("transformers")
  defaults = transformers.GenerationConfig._get_default_generation_params()
  assert default_settings(defaults)[1] == []
  assert default_sampling(defaults).temperature == 0  # its default is greedy


@pytest.mark.parametrize(
  "generation, settings",
  [
    (dict(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, typical_p=0.9, do_sample=True), None),
    (dict(do_sample=False, temperature=0.6, top_p=0.9), dict(temperature=0, top_p=0.9)),
    (dict(max_new_tokens=7, min_new_tokens=2), dict(max_tokens=7, min_tokens=2)),
    (dict(max_length=50, min_length=5), dict(max_tokens=None, max_length=50, min_length=5)),
    (dict(max_length=50, max_new_tokens=7, min_length=5, min_new_tokens=2), dict(max_tokens=7, min_tokens=2)),
    (dict(stop_strings="END"), dict(stop=("END",))),
    (dict(num_return_sequences=3), dict(n=3)),
    (dict(num_beams=4, length_penalty=2.0, early_stopping=True, renormalize_logits=True), None),
    (dict(num_beams=4, do_sample=False), dict(num_beams=4, temperature=0)),  # for who asks for one beam
    (dict(repetition_penalty=1.3, no_repeat_ngram_size=3), None),
    (dict(encoder_repetition_penalty=1.3, encoder_no_repeat_ngram_size=3), None),
    (dict(top_h=0.4, epsilon_cutoff=3e-4, eta_cutoff=1e-3), None),
    (dict(exponential_decay_length_penalty=[5.0, 1.1]), dict(exponential_decay_length_penalty=(5, 1.1))),
    (dict(max_new_tokens=4, min_new_tokens=2, cache_implementation="static"), dict(max_tokens=4, min_tokens=2)),
    (dict(min_new_tokens=30), dict(min_tokens=16)),  # texts end where they end
    (dict(bad_words_ids=[[2], [7, 8]], eos_token_id=[2, 3]), dict(bad_words_ids=((7, 8),))),
    (dict(sequence_bias=[[[1, 2], 0.5]]), dict(sequence_bias={(1, 2): 0.5})),
    (dict(suppress_tokens=[1, 2], begin_suppress_tokens=[3]), None),
    (dict(forced_eos_token_id=[2]), dict(forced_eos_token_id=2)),
    (dict(forced_eos_token_id=[2, 3]), dict(forced_eos_token_id=(2, 3))),
    (dict(eos_token_id=3, use_cache=True, transformers_version="4.40.0"), {}),
    (dict(logit_bias={"5": 1.0}), dict(logit_bias={5: 1.0})),
  ],
)
def test_settings_of_the_file(generation, settings):
  expected = {k: v for k, v in generation.items() if k != "do_sample"} if settings is None else settings
  assert default_settings(generation)[1] == []
  assert default_sampling(generation) == SamplingParams(**expected)


@pytest.mark.parametrize(
  "generation, line",
  [
    (dict(remove_invalid_values=True), "remove_invalid_values = True is not honoured"),
    (dict(cache_implementation="quantized"), "cache_implementation = 'quantized' is not honoured: keys and values"),
    (dict(min_length=30, max_length=20), "min_length = 30 is over max_length = 20, where texts end"),
    (dict(guidance_scale=1.5), "guidance_scale = 1.5 is not honoured"),
    (dict(watermarking_config={"bias": 2.0}), "watermarking_config = .* is not honoured"),
    (dict(num_beams=2, do_sample=True), "do_sample = True is not honoured: beam search draws nothing"),
    (dict(forced_bos_token_id=5), "forced_bos_token_id = 5 is not honoured: a decoder"),
    (dict(temprature=1.0), "temprature = 1.0 is not known"),
  ],
)
def test_what_is_not_honoured_is_said_in_one_line(generation, line):
  [said] = default_settings(generation)[1]
  assert re.match(line, said) and "\n" not in said


def test_what_stands_among_the_settings_that_are_not_honoured_is_said():
  for name, harmless in tables.NOT_HONOURED.items():
    [said] = default_settings({name: 0.3})[1]
    assert said == f"{name} = 0.3 is not honoured"
    assert all(default_settings({name: value})[1] == [] for value in (*harmless, None))


def test_an_encoder_decoders_forced_tokens():
  bart = dict(forced_bos_token_id=0, forced_eos_token_id=2, min_length=56, max_length=142, num_beams=4)
  got = default_sampling(bart, "encoder_decoder")
  assert (got.forced_bos_token_id, got.forced_eos_token_id, got.max_length) == (0, 2, 142)
  assert default_sampling(bart, "encoder_decoder", max_tokens=9, min_tokens=0).max_length is None


def test_wrong_values_are_told_with_the_file():
  with pytest.raises(ConfigError, match="generation_config.json: temperature is -1"):
    default_sampling(dict(temperature=-1))
  with pytest.raises(ConfigError, match="^top_p is 2"):
    default_sampling(dict(temperature=1.0), top_p=2)
  with pytest.raises(ConfigError, match="no sampling setting 'heat'"):
    default_sampling({}, heat=2)


def test_a_model_says_it_when_it_is_loaded(tmp_path, caplog):
  tiny.save(tmp_path / "m")
  (tmp_path / "m" / "generation_config.json").write_text(json.dumps(dict(guidance_scale=1.4, repetition_penalty=1.5)))
  seal(tmp_path / "m")  # it is meant
  with caplog.at_level(logging.WARNING, "jaxllm"):
    model = load_model(tmp_path / "m")
  assert [r.getMessage() for r in caplog.records] == ["generation_config.json: guidance_scale = 1.4 is not honoured"]
  assert model.sampling().repetition_penalty == 1.5


def test_what_is_said_of_a_stranger_s_settings_is_short_and_printable():
  _, said = default_settings({"x\n\x1b[31m": "a\x1b" * 5000, "watermarking_config": ["\u202e"] * 999})
  assert len(said) == 2 and all(line.isprintable() and len(line) < 160 for line in said)
