"""Directories of transformers whose files say how texts are written: loaded, they write what transformers does."""

import json

import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.inference.generation_config import CHANGES_NO_TEXT
from jaxllm.inference.load import load_model
from jaxllm.inference.params import SamplingParams
from jaxllm.interop.directory_files import settings_in_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers_models import V, models  # noqa: E402

T5, BART, MBART, M2M100, LLAMA = (
  *("T5ForConditionalGeneration", "BartForConditionalGeneration", "MBartForConditionalGeneration"),
  *("M2M100ForConditionalGeneration", "LlamaForCausalLM"),
)
PROMPT = np.random.default_rng(3).integers(4, V, 7).tolist()
IDS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)


@pytest.fixture
def directory(tmp_path):
  """directory(name, generation, **config) -> where a model stands with these files; generation None: without one."""

  def write(name, generation, **config):
    at = tmp_path / str(len(list(tmp_path.iterdir())))
    models(name)[0].save_pretrained(at)
    (at / "generation_config.json").unlink()
    if generation is not None:
      (at / "generation_config.json").write_text(json.dumps(generation))
    written = json.loads((at / "config.json").read_text()) | config
    (at / "config.json").write_text(json.dumps({k: v for k, v in written.items() if v is not None}))
    return at

  return write


def reference(directory, prompt, cls):
  model = getattr(transformers, cls).from_pretrained(directory).eval()
  found = model.generate(torch.tensor([prompt]))[0].tolist()[1 if model.config.is_encoder_decoder else len(prompt) :]
  return found[: found.index(1) + 1] if 1 in found else found


@pytest.mark.parametrize(
  "generation",
  [
    dict(),
    dict(forced_bos_token_id=0),
    dict(no_repeat_ngram_size=2),
    dict(min_new_tokens=8),
    dict(repetition_penalty=1.8),
    dict(suppress_tokens=[5, 7, 9, 17, 30]),
    dict(bad_words_ids=[[5], [30, 30]]),
    dict(forced_eos_token_id=1, encoder_no_repeat_ngram_size=2, num_beams=4, early_stopping=True),
    dict(decoder_start_token_id=9),
    dict(decoder_start_token_id=None),
    dict(do_sample=False, temperature=0.6, top_p=0.0),
    dict(pad_token_id=-1),
  ],
  ids=str,
)
def test_what_generation_config_json_says(directory, generation):
  usual = IDS | dict(max_new_tokens=12, decoder_start_token_id=3)
  at = directory(BART, usual | generation)
  want = reference(at, PROMPT, BART)
  assert list(load_model(at).generate(PROMPT)[0].token_ids) == want
  if generation.keys() == {"decoder_start_token_id"}:
    assert want != reference(directory(BART, usual), PROMPT, BART)


@pytest.mark.parametrize("name", [T5, BART, LLAMA])
def test_what_an_old_config_json_says(directory, name):
  """Files from before there was a generation_config.json."""
  old = dict(num_beams=3, no_repeat_ngram_size=2, max_length=14, length_penalty=2.0, early_stopping=True)
  old |= dict(task_specific_params={"summarization": {"num_beams": 1, "min_length": 12, "prefix": "summarize: "}})
  old |= {} if name == LLAMA else dict(forced_bos_token_id=8)
  at = directory(name, None, **old)
  want = reference(at, PROMPT, name)
  assert list(load_model(at).generate(PROMPT)[0].token_ids) == want
  plain = load_model(directory(name, {"eos_token_id": 1, "max_length": 14, "decoder_start_token_id": 3}))
  assert want != list(plain.generate(PROMPT)[0].token_ids)


@pytest.mark.parametrize("generation", [dict(num_beams=2), dict(decoder_start_token_id=9)], ids=str)
def test_an_export_begins_and_ends_texts_as_its_source(directory, tmp_path, generation):
  model = load_model(directory(BART, IDS | generation))
  want = list(model.generate(PROMPT, max_tokens=9)[0].token_ids)
  for form in ("hf", "jaxllm"):
    model.save(tmp_path / form, format=form)
    assert list(load_model(tmp_path / form).generate(PROMPT, max_tokens=9)[0].token_ids) == want
  theirs = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
  got = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=9)[0].tolist()[1:]
  assert got[: got.index(1) + 1 if 1 in got else 9] == want


def test_a_translator_s_target_language(directory):
  """mBART-50's and NLLB's is the caller's choice."""
  for name in (MBART, M2M100):
    at = directory(name, IDS | dict(decoder_start_token_id=1, max_new_tokens=9))
    ours = load_model(at)
    theirs = getattr(transformers, name).from_pretrained(at).eval()
    for language in (11, 12):
      want = theirs.generate(torch.tensor([PROMPT]), forced_bos_token_id=language)[0].tolist()[1:]
      got = list(ours.generate(PROMPT, forced_bos_token_id=language)[0].token_ids)
      assert got == want[: len(got)] and set(want[len(got) :]) <= {2}


def values():
  """Of every setting of transformers one value that a file may have."""
  special = dict(eos_token_id=[1, 7], stop_strings=["x"], early_stopping="never", sequence_bias=[[[1], 2.0]])
  special |= dict(bad_words_ids=[[4]], suppress_tokens=[3], begin_suppress_tokens=[3], constraints=["x"])
  special |= dict(exponential_decay_length_penalty=[3, 1.5], force_words_ids=[[5]], watermarking_config={"bias": 2.5})
  special |= dict(dola_layers="high", cache_implementation="static", num_return_sequences=1)
  switches = ("do_sample", "renormalize_logits", "remove_invalid_values", "token_healing", "is_assistant")
  shares = ("temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "max_time")
  shares += (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "length_penalty",
    "guidance_scale",
    "diversity_penalty",
  )
  shares += ("penalty_alpha", "assistant_ensemble_weight")
  names = vars(transformers.GenerationConfig()).keys() - {"_original_object_hash"} - CHANGES_NO_TEXT
  own = lambda name: True if name in switches else 0.5 if name in shares else 3  # noqa: E731
  return {name: special.get(name, own(name)) for name in sorted(names)}


def test_every_setting_is_found_in_an_old_config_json():
  each = values()
  for inner in (None, "decoder", "text_config"):
    for name, value in each.items():
      config = {name: value} if inner is None else {inner: {name: value}}
      theirs = transformers.GenerationConfig.from_model_config(json.loads(json.dumps(config))).to_dict()
      assert settings_in_config(config) == {name: theirs[name]} or name == "watermarking_config", (name, inner)
  assert settings_in_config({"num_beams": 4, "decoder": {"num_beams": 2, "top_k": 9}}) == {"num_beams": 4, "top_k": 9}
  assert settings_in_config({"force_bos_token_to_be_generated": True, "bos_token_id": 5})["forced_bos_token_id"] == 5


def test_where_the_file_draws_nothing_who_asks_for_a_draw_gets_one(directory):
  model = load_model(directory(LLAMA, IDS | dict(temperature=0.7, top_p=0.9)))
  assert model.sampling() == SamplingParams(temperature=0, top_p=0.9)
  assert model.sampling(top_p=0.5) == SamplingParams(temperature=0.7, top_p=0.5)
  assert model.sampling(n=2).temperature == 0.7 and model.sampling(temperature=0, n=2).temperature == 0
  assert model.sampling(seed=1, max_tokens=3).temperature == 0
  drawn = load_model(directory(LLAMA, IDS | dict(temperature=0.7, do_sample=True)))
  assert drawn.sampling() == SamplingParams(temperature=0.7)


def test_what_transformers_refuses_too_is_one_line(directory):
  model = load_model(directory(LLAMA, IDS | dict(num_beams=2, num_return_sequences=3)))
  with pytest.raises(ConfigError, match="the model's generation_config.json: n is 3; it must be at most num_beams"):
    model.generate(PROMPT)
