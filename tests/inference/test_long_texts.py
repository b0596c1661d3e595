"""Texts over max_seq_len of models whose positions are relative: read and continued as by transformers."""

import dataclasses
import functools

import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine import Engine, Request
from jaxllm.inference.model import Model
from jaxllm.inference.params import SamplingParams
from jaxllm.models.config import ModelConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoint_arrays import params_from_huggingface  # noqa: E402

V, LIMIT, LONG = 40, 16, 50
T5, BLOOM = "T5ForConditionalGeneration", "BloomForCausalLM"
FALCON, DEBERTA = "FalconForCausalLM", "DebertaV2ForMaskedLM"
SIZES = dict(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
UNTIED = dict(tie_word_embeddings=False)
CASES = {
  T5: UNTIED
  | dict(vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, n_positions=LIMIT)
  | dict(relative_attention_num_buckets=8, relative_attention_max_distance=40, decoder_start_token_id=0),
  BLOOM: SIZES | UNTIED | dict(seq_length=LIMIT),
  FALCON: SIZES | UNTIED | dict(max_position_embeddings=LIMIT, alibi=True, multi_query=False),
  DEBERTA: SIZES
  | dict(max_position_embeddings=LIMIT, intermediate_size=32, type_vocab_size=0, position_biased_input=False)
  | dict(pos_att_type=["c2p", "p2c"], relative_attention=True, share_att_key=True, norm_rel_ebd="layer_norm")
  | dict(position_buckets=4),
}


@functools.cache
def models(name):
  """(transformers model, ours)."""
  cls = getattr(transformers, name)
  torch.manual_seed(0)
  theirs = cls(cls.config_class(**CASES[name])).eval()
  with torch.no_grad():
    for p in theirs.parameters():
      if p.ndim > 1:
        p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)
  tensors = {key: x.numpy() for key, x in theirs.state_dict().items() if key not in theirs._tied_weights_keys}
  if name != DEBERTA:
    tensors["lm_head.weight"] = theirs.lm_head.weight.detach().numpy()
  config, params = params_from_huggingface(theirs.config.to_dict() | CASES[name], tensors)
  assert config.max_seq_len == LIMIT
  return theirs, Model(config, params)


def prompt(length=LONG):
  return np.random.default_rng(length).integers(4, V, length).tolist()


@pytest.mark.parametrize("name, beams", [(T5, 1), (T5, 3), (BLOOM, 1), (FALCON, 1)])
def test_a_long_prompt_is_continued_as_by_transformers(name, beams):
  theirs, ours = models(name)
  first, count = (1, 2 * LIMIT) if name == T5 else (LONG, 10)  # T5's decoder too goes past max_seq_len
  ids = torch.tensor([prompt()])
  settings = dict(max_new_tokens=count, num_beams=beams, no_repeat_ngram_size=2, eos_token_id=None, pad_token_id=0)
  want = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, first:].tolist()
  (got,) = ours.generate(prompt(), max_tokens=count, num_beams=beams, no_repeat_ngram_size=2, temperature=0)
  assert list(got.token_ids) == want
  assert len(want) == count


@pytest.mark.parametrize("name", CASES)
def test_logits_of_long_texts(name):
  theirs, ours = models(name)
  ids = torch.tensor([prompt()])
  with torch.no_grad():
    want = theirs(ids, **{"decoder_input_ids": ids} if name == T5 else {}).logits.numpy()
  np.testing.assert_allclose(ours(ids.numpy(), ids.numpy() if name == T5 else None), want, atol=3e-5)


@pytest.mark.parametrize("name", [DEBERTA, T5])
def test_an_encoder_reads_long_texts(name):
  theirs, ours = models(name)
  encoder = theirs.encoder if name == T5 else theirs.deberta
  for got, length in zip(ours.encode([prompt(LONG), prompt(5)]), (LONG, 5), strict=True):
    with torch.no_grad():
      want = encoder(torch.tensor([prompt(length)])).last_hidden_state[0].numpy()
    np.testing.assert_allclose(got, want, atol=3e-5)


def test_an_engine_has_room_for_long_texts_if_told():
  _, ours = models(T5)
  settings = dict(temperature=0, max_tokens=2 * LIMIT)
  engine = Engine.of(ours, max_model_len=64, max_num_seqs=1, max_tokens_per_step=1, max_logprobs=0, max_biases=(1, 1))
  engine.submit(Request(prompt(), SamplingParams(**settings)))
  got = ()
  while engine.busy:
    got += sum((delta.token_ids for delta in engine.step()), ())
  assert got == ours.generate(prompt(), **settings)[0].token_ids
  with pytest.raises(ConfigError, match="the prompt has 65 tokens, and there is room for 64 .max_source_len 64"):
    engine.submit(Request(prompt(65)))


@pytest.mark.parametrize("name", [T5, BLOOM])
def test_engines_have_room_for_max_seq_len_unless_told(name):
  sizes = Engine.of(models(name)[1], max_num_seqs=1).sizes
  assert sizes.max_model_len == sizes.max_source_len == LIMIT
  assert Engine.of(models(name)[1], max_num_seqs=1, max_model_len=90).sizes.longest_prompt()[0] == 90 - (name == BLOOM)


def test_where_nothing_says_how_long_a_text_gets_it_is_over_at_max_seq_len():
  _, ours = models(BLOOM)
  ours.generate(prompt(), max_tokens=10)  # by an engine with more room
  assert len(ours.generate(prompt(5), max_tokens=None, ignore_eos=True)[0].token_ids) == LIMIT - 5
  with pytest.raises(ConfigError, match="the prompt has 50 tokens and max_length is 16; raise it"):
    ours.generate(prompt(), max_tokens=None)


def test_short_prompts_of_all_lengths_share_an_engine():
  _, short = models(T5)
  ours = Model(dataclasses.replace(short.config, max_seq_len=512), short.params)
  ours.generate(prompt(5), max_tokens=4)
  before = ours._generator._served
  ours.generate(prompt(120), max_tokens=4)
  assert ours._generator._served is before


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
def test_other_positions_have_a_limit(position):
  both = dict(relative_bias="learned") if position == "learned" else {}  # MPNet's
  sizes = dict(vocab_size=V, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=LIMIT)
  assert ModelConfig(**sizes, position=position, **both).has_length_limit
