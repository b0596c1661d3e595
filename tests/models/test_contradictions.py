"""Files that contradict themselves are read as transformers reads them, and a line says so."""

import itertools
import json
import logging

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import test_decoder_families as decoders  # noqa: E402
import test_encoder_families as encoders  # noqa: E402
from checkpoint_arrays import params_from_huggingface  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from test_absent_keys import read  # noqa: E402
from test_spellings import FIRST, completed, saved  # noqa: E402

from jaxllm.base.errors import CheckpointError  # noqa: E402
from jaxllm.interop.huggingface_keys import remarks  # noqa: E402

LONG = {"short_factor": [1.0, 1.1, 1.3, 1.4], "long_factor": [1.0, 2.0, 5.0, 6.0]}
ADDED = {
  "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
  "yarn with a theta": {"type": "yarn", "factor": 2.0, "rope_theta": 777.0, "truncate": False},
  "linear": {"type": "linear", "factor": 2.0},
  "dynamic": {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 16},
  "longrope": LONG | {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16},
  "llama3": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
  "default": {"rope_type": "default", "rope_theta": 555.0},
}
ROPE = [name for cls, name in FIRST.items() if hasattr(getattr(transformers, cls), "rope_parameters")]
OWN_THETA = {"rope_theta": 1234.0, "rotary_emb_base": 1234.0, "global_rope_theta": 1234.0}


@pytest.mark.parametrize("name", ROPE)
def test_rope_scaling_beside_rope_parameters(name):
  """As the card of Qwen 2.5 tells people to add it to files that newer versions of transformers wrote."""
  cls, hf = saved(name)
  hf.pop("rope_scaling", None)
  if isinstance(hf.get("num_attention_heads"), int) and "head_dim" not in hf:
    hf["num_attention_heads"] = 4
  full = cls.from_dict(dict(hf)).to_dict()
  nested = "full_attention" in full["rope_parameters"]
  agreed = 0
  for (kind, added), theta, own in itertools.product(ADDED.items(), ({}, OWN_THETA), (True, False)):
    given = json.loads(json.dumps(full | theta | {"rope_scaling": added}))
    if not own:
      del given["rope_parameters"]
    try:
      want = completed(cls, json.loads(json.dumps(given)))
    except Exception:  # transformers does not take it either
      continue
    got = read(given)
    assert got == read(want), (kind, theta, own)
    agreed += got is not None
    if got is not None and own and not nested and kind == "yarn":
      assert any("rope_scaling beside rope_parameters" in line for line in remarks(given))
  assert agreed >= 4


def test_the_card_of_qwen(caplog):
  """Its logits, with a theta that the added group has not: transformers takes its class's, and so it is said."""
  settings = decoders.GQA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
  hf = transformers.Qwen2Config(**settings).to_dict()
  hf["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
  config = transformers.Qwen2Config.from_dict(json.loads(json.dumps(hf)))
  model = oracle.torch_model(transformers.Qwen2ForCausalLM, config)
  c, params = params_from_huggingface(hf, oracle.tensors_of(model))
  tokens = np.random.default_rng(1).integers(3, decoders.V, (2, 20))
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits.numpy()
  _, logits = decoders.forward(c)(params, tokens, jnp.ones(tokens.shape, jnp.int32))
  np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5)
  [line] = [line for line in remarks(hf) if "beside" in line]
  assert "rope_theta of 10000.0" in line and "not 1000000.0" in line


def test_yarn_allows_the_length_that_it_stretches_to():
  hf = transformers.Qwen2Config(**decoders.GQA).to_dict()
  yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
  assert hf["max_position_embeddings"] == 64
  assert read(hf | {"rope_parameters": yarn}).max_seq_len == 256
  assert read(hf | {"rope_parameters": yarn, "max_position_embeddings": 512}).max_seq_len == 512


TIED = ["llama", "gemma2", "gpt2", "olmo2", "falcon", "qwen2", "cohere", "starcoder2"]


@pytest.mark.parametrize("name", TIED)
def test_a_head_of_its_own_in_a_file_that_says_it_is_tied(name, tmp_path, caplog):
  stem, settings = (decoders.NEWER | decoders.OLDER)[name]
  config = getattr(transformers, f"{stem}Config")(**settings | {"tie_word_embeddings": False})
  cls = getattr(transformers, decoders.CLASSES.get(stem, f"{stem}ForCausalLM"))
  oracle.torch_model(cls, config).save_pretrained(tmp_path)
  hf = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
  (tmp_path / "config.json").write_text(json.dumps(hf))
  model = cls.from_pretrained(tmp_path, attn_implementation="eager").eval()
  tensors = load_file(tmp_path / "model.safetensors")
  with caplog.at_level(logging.WARNING, "jaxllm"):
    c, params = params_from_huggingface(hf, tensors)
  assert not c.tie_embeddings and "differs from them" in caplog.text
  np.testing.assert_array_equal(params["head"]["weight"].T, model.get_output_embeddings().weight.detach().numpy())
  caplog.clear()
  table = next(key for key, x in tensors.items() if np.array_equal(x, np.asarray(params["embedding"]["tokens"])))
  assert params_from_huggingface(hf, tensors | {"lm_head.weight": tensors[table]})[0].tie_embeddings
  # Of a tied pair the file may have the head alone.
  swapped = {"lm_head.weight" if key == table else key: x for key, x in tensors.items()}
  save_file(swapped, tmp_path / "model.safetensors", metadata={"format": "pt"})
  want = cls.from_pretrained(tmp_path).get_input_embeddings().weight.detach().numpy()
  c, params = params_from_huggingface(hf, swapped)
  np.testing.assert_array_equal(params["embedding"]["tokens"], want)
  assert c.tie_embeddings and not caplog.text


@pytest.mark.parametrize("name", ["bart", "t5", "mbart"])
def test_copies_of_the_embedding(name):
  """Old files have one for each side; a file may have any of them, and one that differs is another model."""
  model, hf, config, params = encoders.case(name)
  tensors = encoders.tensors_of(model)
  [table] = [key for key in tensors if key.endswith("shared.weight")]
  sides = [table.replace("shared", f"{side}.embed_tokens") for side in ("encoder", "decoder")]
  for names in (sides, [*sides, table], sides[:1], sides[1:], ["lm_head.weight"]):
    others = {key: x for key, x in tensors.items() if key != table} | {key: tensors[table] for key in names}
    got_config, got = params_from_huggingface(hf, others)
    assert got_config == config
    np.testing.assert_array_equal(got["embedding"]["tokens"], params["embedding"]["tokens"])
  with pytest.raises(CheckpointError, match="embed_tokens.weight differs from"):
    params_from_huggingface(hf, tensors | {sides[1]: tensors[table] + 1})


@pytest.mark.parametrize("name", ["bert-mlm", "roberta-mlm", "mpnet-mlm", "deberta-mlm"])
def test_two_names_of_a_bias(name, tmp_path):
  """The head adds one of them: where they differ, that which its matrix has."""
  model, hf, config, params = encoders.case(name)
  tensors = encoders.tensors_of(model)
  own, copy = next(
    (key, key.replace("predictions.bias", "predictions.decoder.bias").replace("lm_head.bias", "lm_head.decoder.bias"))
    for key in tensors
    if key in ("cls.predictions.bias", "lm_head.bias")
  )
  changed = tensors | {copy: tensors[own] + 1}
  for given in (changed, {key: x for key, x in changed.items() if key != own}):
    save_file(given, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hf))
    again = type(model).from_pretrained(tmp_path).eval()
    want = again.get_output_embeddings().bias.detach().numpy()
    np.testing.assert_array_equal(params_from_huggingface(hf, given)[1]["head"]["bias"], want)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_an_epsilon_that_short_vectors_do_not_have(name):
  """Moonlight's: its norms of latent vectors keep that of the code."""
  stem, settings = decoders.NEWER[name]
  config = getattr(transformers, f"{stem}Config")(**settings | {"rms_norm_eps": 0.3})
  model = oracle.torch_model(getattr(transformers, f"{stem}ForCausalLM"), config)
  c, params = params_from_huggingface(config.to_dict(), oracle.tensors_of(model))
  tokens = np.random.default_rng(1).integers(3, decoders.V, (2, 20))
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits.numpy()
  _, logits = decoders.forward(c)(params, tokens, jnp.ones(tokens.shape, jnp.int32))
  np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5)
