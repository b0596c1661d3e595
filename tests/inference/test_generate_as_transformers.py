"""Settings of generation_config.json, drawn together: the tokens are transformers', whatever they are."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxllm.base.errors import DataError
from jaxllm.inference.generation_config import default_settings
from jaxllm.interop.directory_files import as_transformers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers_models import CASES, V, models  # noqa: E402

EXAMPLES = 8
PROMPTS = [np.random.default_rng(n).integers(4, V, n).tolist() for n in (6, 5, 1)]
# Sequences with a bias of nothing: engines have as much room for them as for any drawn here, and so are one.
NOTHING = [[[37, 38, 39, i], 0.0] for i in range(17)]
VALUES = {
  "min_new_tokens": [2, 6],
  "min_length": [3, 9],
  "max_length": [9, 12],
  "no_repeat_ngram_size": [1, 2, 3],
  "encoder_no_repeat_ngram_size": [1, 2, 3],
  "repetition_penalty": [1.8, 0.7],
  "encoder_repetition_penalty": [2.5, 0.4],
  "bad_words_ids": [[[5], [6, 7]], [[1], [17, 30, 2], [30, 17]], [[21], [4, 4], [1, 1]]],
  "sequence_bias": [[[[8, 11], 3.0], [[12], -2.0]], [[[1], 2.5], [[20, 21], -1.5], [[21], 2.0]]],
  "suppress_tokens": [[9, 30], [3, 19, 24]],
  "begin_suppress_tokens": [[1, 17, 30], [4, 28]],
  "exponential_decay_length_penalty": [[0, 1.3], [2, 2.5], [1, 0.5]],
  "renormalize_logits": [True],
  "forced_eos_token_id": [1, [7], [7, 1]],
  "forced_bos_token_id": [8],
  "eos_token_id": [1, [1, 17, 30], None],
  "pad_token_id": [0, None],
  "length_penalty": [0.0, 2.5, -1.0],
  "early_stopping": [True, False, "never"],
  "num_return_sequences": [1, 2],
}
UNHEEDED = {  # by what draws nothing
  "temperature": [0.5],
  "top_k": [3],
  "top_p": [0.5, 0.0],
  "min_p": [0.5],
  "typical_p": [0.2],
  "epsilon_cutoff": [0.1],
  "eta_cutoff": [0.1],
  "top_h": [0.3],
  "do_sample": [False, None],
  "use_cache": [False, True],
  "remove_invalid_values": [False],
  "num_beam_groups": [1],
  "diversity_penalty": [0.0],
}


@st.composite
def settings(draw, beams):
  names = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=2, max_size=6, unique=True))
  names += draw(st.lists(st.sampled_from(sorted(UNHEEDED)), max_size=2, unique=True))
  found = {"max_new_tokens": 8, "num_beams": beams}
  found |= {name: draw(st.sampled_from((VALUES | UNHEEDED)[name]), label=name) for name in names}
  if "max_length" in found:
    del found["max_new_tokens"]
  if beams == 1:
    found.pop("num_return_sequences", None)
  return found


def reference(name, prompt, generation):
  theirs, ours = models(name)
  decoder = ours.config.architecture == "decoder"
  theirs.generation_config = transformers.GenerationConfig(**generation)
  found = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long))
  ends = generation["eos_token_id"]
  ends = {ends} if not isinstance(ends, list) else set(ends)
  texts = [tokens[len(prompt) if decoder else 1 :] for tokens in found.tolist()]
  lengths = [next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens)) for tokens in texts]
  return [tokens[:length] for tokens, length in zip(texts, lengths)]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_tokens_are_those_of_transformers(name, beams):
  theirs, ours = models(name)
  before = theirs.generation_config
  start = ours.config.decoder_start_id
  seen = []

  @hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
  @hypothesis.given(st.sampled_from(PROMPTS), settings(beams))
  def check(prompt, found):
    decoder = ours.config.architecture == "decoder"
    if decoder and len(prompt) == 1:
      found.pop("forced_bos_token_id", None)  # of a decoder it is said that it is not honoured
    generation = {"eos_token_id": 1, "decoder_start_token_id": start} | found
    generation["sequence_bias"] = [*found.get("sequence_bias", []), *NOTHING]
    want = reference(name, prompt, generation)
    ours.generation = as_transformers(json.loads(json.dumps(generation)), not decoder)
    said = default_settings(ours.generation, ours.config.architecture)[1]
    assert all(line.startswith("forced_bos_token_id") for line in said)
    try:
      got = [list(done.token_ids) for done in ours.generate([prompt], ours.sampling())]
    except DataError as error:  # there the reference says token 0
      assert "its settings leave none over" in str(error)
      return
    assert got == want
    seen.append(tuple(map(tuple, got)))

  try:
    check()
  finally:
    theirs.generation_config, ours.generation = before, {"eos_token_id": 1}
  assert len(set(seen)) > 2  # they do something
