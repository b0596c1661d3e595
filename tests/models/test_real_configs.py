"""Real config.json files end to end, as small models of the same oddities: transformers saves one with random weights,
this package opens it, computes and decodes what transformers does, and writes the same files back.

`FAMILIES_TABLE=1 pytest tests/models/test_real_configs.py` writes docs/families.md of what was seen."""

import copy
import json
import os
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import families_table  # noqa: E402
from hypothesis import Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from shrinking import REAL, TEXT, class_of, completed, family_of, shrunk  # noqa: E402
from test_encoder_families import forward  # noqa: E402

from jaxllm.base.errors import ConfigError  # noqa: E402
from jaxllm.inference.model import Model  # noqa: E402
from jaxllm.interop.families import FAMILIES  # noqa: E402
from jaxllm.interop.huggingface import _canonical, _renamed, config_from_huggingface  # noqa: E402
from jaxllm.interop.open import open_model  # noqa: E402
from jaxllm.interop.write import write_model  # noqa: E402

TOLERANCE = 1e-5  # of the largest of theirs; where both are further from float64, four times what theirs is
NEW = 10  # tokens decoded


def saved(config, directory, seed):
  """The transformers model of a config.json with every weight random, in `directory` beside that very config.json."""
  cls, hf = class_of(config), completed(config)
  hf.architectures, hf._experts_implementation = [cls.__name__], "eager"  # the other wants sizes of whole 16 bytes
  model = oracle.torch_model(cls, hf, seed)
  if config["model_type"] == "falcon":
    model.config._attn_implementation = "sdpa"  # its eager one adds ALiBi twice
  with torch.no_grad():
    if hasattr(model, "lm_head") and "T5" in cls.__name__ and config.get("tie_word_embeddings") is False:
      # these classes tie a fresh model's in any case
      model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * config["d_model"] ** -0.5)
    elif hf.get_text_config().tie_word_embeddings:  # else the token itself is all that the head sees
      model.get_input_embeddings().weight.mul_(0.1)
    for key, buffer in model.named_buffers():
      if key.endswith(("e_score_correction_bias", "final_logits_bias")):
        buffer.copy_(0.3 * torch.randn_like(buffer))
  model.save_pretrained(directory)
  (Path(directory) / "config.json").write_text(json.dumps(config))
  return model


def batch_of(model, vocab_size, seed):
  """Two texts, the second shorter; of an encoder-decoder two sources and two targets."""
  rng, mask = np.random.default_rng(seed), (np.arange(TEXT) < np.array([[TEXT], [TEXT - 9]])).astype(np.int32)
  tokens = np.where(mask, rng.integers(8, vocab_size - 8, (2, TEXT)), model.config.get_text_config().pad_token_id or 0)
  batch = {"tokens": tokens, "segment_ids": mask}
  if not model.config.is_encoder_decoder:
    return batch
  if "Classification" in type(model).__name__:  # the decoder reads the same text, one place later, up to its end
    source = np.where(np.arange(TEXT) == mask.sum(-1, keepdims=True) - 1, model.config.eos_token_id, tokens)
    tokens = np.concatenate([np.full((2, 1), model.config.decoder_start_token_id or 0), source[:, :-1]], axis=1)
    return {"tokens": tokens, "segment_ids": mask, "source": source, "source_segment_ids": mask}
  return batch | {"source": tokens[::-1], "source_segment_ids": mask[::-1]}


def outputs(model, batch):
  """What the transformers model makes of a batch: logits, or hidden states and what stands for each text."""
  names = {"tokens": "input_ids", "segment_ids": "attention_mask"}
  if model.config.is_encoder_decoder:
    names = {key: f"decoder_{name}" for key, name in names.items()}
    names |= {"source": "input_ids", "source_segment_ids": "attention_mask"}
  with torch.no_grad():
    out = model(**{names[key]: torch.tensor(x.copy()).long() for key, x in batch.items()})
  if "start_logits" in out:
    return [torch.stack([out.start_logits, out.end_logits], -1).numpy()]
  if "logits" in out:
    return [out.logits.numpy()]
  pooled = out.get("pooler_output")
  return [out.last_hidden_state.numpy()] + ([] if pooled is None else [pooled.numpy()])


def error(ours, theirs, real):
  """The largest difference where there is text, over the largest of theirs."""
  ours = np.asarray(ours)
  if theirs.shape[:2] == real.shape:
    ours, theirs = ours[real], theirs[real]
  return float(np.abs(ours.reshape(theirs.shape) - theirs).max() / np.abs(theirs).max())


def greedy(model, ours, vocab_size, seed):
  """Whether both decode the same tokens after prompts longer than any window here."""
  rng = np.random.default_rng(seed)
  prompts = [rng.integers(8, vocab_size - 8, length).tolist() for length in (TEXT - 9, TEXT - 12)]
  start = ours.config.decoder_start_id if model.config.is_encoder_decoder else None
  how = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "decoder_start_token_id": start}
  model.generation_config = transformers.GenerationConfig(**how)  # without what files force, suppress or search
  completions = ours.generate(prompts, temperature=0.0, max_tokens=NEW)
  for prompt, completion in zip(prompts, completions, strict=True):
    ids = torch.tensor([prompt])
    want = model.generate(ids, attention_mask=torch.ones_like(ids))
    assert list(completion.token_ids) == want[0, -NEW:].tolist()


def check(name, config, seed, decode):
  """Holds a config.json's model with random weights beside transformers'; decoding takes most of the time."""
  with tempfile.TemporaryDirectory() as directory:
    model = saved(config, f"{directory}/theirs", seed)
    ours = open_model(f"{directory}/theirs")
    params, c = ours.params(), ours.config
    family, headed = FAMILIES[family_of(config)], f"{directory}/theirs"
    if c.head == "lm" and type(model).__name__ == family.bare:  # tied: the embedding is its head
      model, headed = getattr(transformers, family.architecture).from_pretrained(headed).eval(), f"{directory}/headed"
      model.save_pretrained(headed)
    batch = batch_of(model, c.vocab_size, seed)
    hidden, logits = forward(c)(params, batch)
    want = outputs(model, batch)
    got = [hidden, logits][: len(want)] if c.head == "none" else [logits]
    real = batch["segment_ids"] == 1
    off = max(error(x, y, real) for x, y in zip(got, want, strict=True))
    if off > TOLERANCE:
      exact = outputs(copy.deepcopy(model).double(), batch)
      ours_off, theirs_off = (max(error(x, y, real) for x, y in zip(xs, exact, strict=True)) for xs in (got, want))
      assert ours_off < 4 * theirs_off
    exports(ours, model, batch, want, headed, f"{directory}/ours")
    decode &= c.head == "lm" and c.architecture != "encoder"
    if decode:
      greedy(model, Model(c, params), c.vocab_size, seed)
  families_table.saw(name, config, off, decode)


def exports(ours, model, batch, want, theirs, written):
  """The file that is written has the tensors that were read, and its config.json says the same to transformers."""
  family = FAMILIES[family_of(model.config.to_dict())]
  text = f"{family.name}_text" if family.text_config else family.name  # its language model alone
  write_model(ours, written, format="hf", family=text)
  read, wrote = (load_file(f"{directory}/model.safetensors") for directory in (theirs, written))
  if family.text_config:
    read = {_renamed(key, family): x for key, x in read.items() if not any(fnmatch(key, p) for p in family.ignored)}
  assert not read.keys() ^ wrote.keys()
  for key, tensor in read.items():
    assert tensor.dtype == wrote[key].dtype and tensor.tobytes() == wrote[key].tobytes(), key
  hf = json.loads(Path(written, "config.json").read_text())
  assert _canonical(config_from_huggingface(hf)) == _canonical(ours.config)
  how = {"attn_implementation": model.config._attn_implementation, "experts_implementation": "eager"}
  again, info = class_of(hf).from_pretrained(written, **how, output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  for got, x in zip(outputs(again, batch), want, strict=True):  # one activation has names with other roundings
    np.testing.assert_allclose(got, x, rtol=0, atol=1e-6 * np.abs(x).max())


def variants():
  """ "a real model, as a class" -> its config.json, of each head that no real configuration has."""
  real = {(family_of(config), families_table.head_of(config)) for config in REAL.values()}
  first = {family_of(config): (name, config) for name, config in reversed(REAL.items())}
  made = {}
  for family, head in families_table.rows():
    if (family, head) not in real:
      name, config = first[family]
      cls = families_table.classes(family)[head]
      padded = {"pad_token_id": config.get("pad_token_id") or 0} if head == "sequence" else {}  # or no class pads
      made[f"{name}, as {cls}"] = config | padded | {"architectures": [cls]}
  return made


CONFIGS = REAL | variants()


def hold(name, examples, decode):
  """Holds small models of a configuration beside transformers'; hypothesis chooses how small."""

  @settings(max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
  @given(st.data())
  def run(data):
    def choose(label, options):
      first = sum(f"{name} {label}".encode())  # or every configuration's first example would be of the first options
      return options[(first + data.draw(st.integers(0, len(options) - 1), label=label)) % len(options)]

    check(name, shrunk(CONFIGS[name], choose), data.draw(st.integers(0, 99), label="seed"), decode)

  run()


# Beside the first of each family and head, those that are like no other of theirs
ODD = (
  "meta-llama/Llama-3.1-8B",
  "HuggingFaceTB/SmolLM2-135M",
  "deepseek-ai/deepseek-coder-6.7b-base",
  "internlm/internlm-7b, as a Llama",
  "internlm/internlm2-chat-7b, as a Llama",
  "mistralai/Mistral-Nemo-Base-2407",
  "microsoft/Phi-4-mini-instruct",
  "togethercomputer/RedPajama-INCITE-7B-Base",
  "deepseek-ai/DeepSeek-V2",
  "moonshotai/Kimi-K2-Instruct",
  "facebook/opt-350m",
  "tiiuae/falcon-40b",
  "tiiuae/falcon-rw-1b",
  "CohereForAI/c4ai-command-r-plus",
  "google/electra-base-generator",
  "microsoft/deberta-v2-xlarge",
  "google/flan-t5-base",
)
DECODED = ("mistralai/Mistral-7B-v0.1", "facebook/opt-350m")  # the others in `test_many`


TABLE = bool(os.environ.get("FAMILIES_TABLE"))  # then every family and head is there, and decodes


def firsts(of):
  """The names of the first configurations by what `of` says of them."""
  found = {}
  for name, config in CONFIGS.items():
    found.setdefault(of(config), name)
  return list(found.values())


FIRSTS = firsts(lambda c: (family_of(c), families_table.head_of(c))) if TABLE else firsts(family_of)


@pytest.mark.parametrize("name", dict.fromkeys((*FIRSTS, *ODD)))
def test_one(name):
  hold(name, 1, TABLE or name in DECODED)


@pytest.mark.slow
@pytest.mark.skipif(not TABLE, reason="takes half an hour; FAMILIES_TABLE=1 runs it")
@pytest.mark.parametrize("name", CONFIGS)
def test_many(name):
  hold(name, 3, True)


def test_shrinking_keeps_every_key():
  for name in REAL:
    for last in (0, -1):
      config = shrunk(REAL[name], lambda _, options, at=last: options[at])
      assert config.keys() >= REAL[name].keys()
      assert config_from_huggingface(config).layer_kinds == config_from_huggingface(REAL[name]).layer_kinds, name


@pytest.fixture(autouse=True)
def no_programs():
  """None is of use to another model, and a process may have so many only (tests/conftest.py)."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def page():
  """Writes what was seen, where that was asked for."""
  yield
  if os.environ.get("FAMILIES_TABLE"):
    families_table.write()


def test_the_page_has_every_family_and_head():
  """`FAMILIES_TABLE=1 pytest tests/models/test_real_configs.py` writes it."""
  lines = [line.split(" | ")[:2] for line in families_table.PAGE.read_text().splitlines() if line.startswith("| ")]
  there = [(family.removeprefix("| "), head) for family, head in lines[2:]]
  assert there == [families_table.row_names(*row) for row in families_table.rows()]


def test_gemma_4_is_refused_by_name():
  with pytest.raises(ConfigError, match="model_type 'gemma4'"):
    config_from_huggingface({"model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"]})
