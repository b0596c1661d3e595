"""Files of classes without a head, with and without the prefix of those that have one, and old names of tensors."""

import json
import logging

import jax
import numpy as np
import pytest

transformers = pytest.importorskip("transformers")

import test_decoder_families as decoders  # noqa: E402
import test_encoder_families as encoders  # noqa: E402
from checkpoint_arrays import params_from_huggingface, params_to_huggingface  # noqa: E402
from flax import traverse_util  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from jaxllm.base.errors import CheckpointError  # noqa: E402
from jaxllm.interop.families import FAMILIES  # noqa: E402

DECODERS = list(decoders.NEWER | decoders.OLDER)
ENCODERS = [name for name in encoders.ENCODERS if name.endswith(("-mlm", "-bare", "-generator"))]
BART = [name for name in encoders.ENCODER_DECODERS if "bart" in name or "m2m" in name]


def saved(model, directory):
  """(config.json, tensors) as `save_pretrained` writes them."""
  model.save_pretrained(directory)
  with open(directory / "config.json", encoding="utf-8") as file:
    return json.load(file), load_file(directory / "model.safetensors")


def flat(params):
  return traverse_util.flatten_dict(params, sep="/")


def assert_same(got, want):
  """Equal but for the head, and all of them there."""
  got, want = ({path: x for path, x in flat(params).items() if not path.startswith("head/")} for params in (got, want))
  assert got.keys() == want.keys()
  for path, x in got.items():
    np.testing.assert_array_equal(x, want[path], err_msg=path)


@pytest.mark.parametrize("name", DECODERS)
def test_bare_decoders(name, tmp_path):
  """A head that is the embedding is there all the same, as in transformers; else the model has none."""
  model, full, tensors, config, params = decoders.case(name)
  hf, bare = saved(model.base_model, tmp_path)
  assert hf["architectures"] == [FAMILIES[hf["model_type"]].bare]
  got_config, got = params_from_huggingface(hf, bare)
  assert got_config.head == ("lm" if config.tie_embeddings else "none")
  assert_same(got, params)
  written, again = params_to_huggingface(got_config, hf["model_type"], got)
  if got_config.head == "none":
    assert written["architectures"] == hf["architectures"] and again.keys() == bare.keys()
    assert params_from_huggingface(written, again)[0] == got_config
  # The prefix neither has to be there nor to lack.
  prefix = FAMILIES[hf["model_type"]].prefix
  assert_same(params_from_huggingface(hf, {prefix + key: x for key, x in bare.items()})[1], params)
  jax.tree.map(
    np.testing.assert_array_equal,
    params_from_huggingface(full, {key.removeprefix(prefix): x for key, x in tensors.items()})[1],
    params,
  )


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_whose_config_names_no_class(name):
  model, hf, tensors, config, params = decoders.case(name)
  silent = {key: value for key, value in hf.items() if key != "architectures"}
  assert params_from_huggingface(silent, tensors)[0] == config
  if not config.tie_embeddings:
    headless = {key: x for key, x in tensors.items() if not key.startswith(("lm_head", "embed_out"))}
    assert params_from_huggingface(silent, headless)[0].head == "none"
    with pytest.raises(CheckpointError, match="lacks the tensor"):
      params_from_huggingface(hf, headless)


@pytest.mark.parametrize("name", ENCODERS)
def test_bare_encoders(name, tmp_path):
  model, full, config, params = encoders.case(name)
  hf, bare = saved(model.base_model, tmp_path)
  got_config, got = params_from_huggingface(hf, bare)
  assert got_config.head == "none"
  assert_same(got, params)
  assert (got_config.head_dense is not None) == any("pooler" in key for key in bare)
  silent = {key: value for key, value in hf.items() if key != "architectures"}
  assert params_from_huggingface(silent, bare)[0] == got_config
  prefix = FAMILIES[hf["model_type"]].prefix
  assert_same(params_from_huggingface(hf, {prefix + key: x for key, x in bare.items()})[1], params)
  written, again = params_to_huggingface(got_config, hf["model_type"], got)
  assert again.keys() == {key for key in bare if not key.endswith("position_ids")}
  for key, x in again.items():
    np.testing.assert_array_equal(x, bare[key], err_msg=key)
  assert written["architectures"] == hf["architectures"]


@pytest.mark.parametrize("name", ["bert-mlm", "roberta-mlm", "distilbert-mlm", "mpnet-mlm", "deberta-mlm"])
def test_a_bare_class_in_the_config_of_a_file_with_a_head(name, caplog):
  model, full, config, params = encoders.case(name)
  hf = full | {"architectures": [FAMILIES[full["model_type"]].bare]}
  with caplog.at_level(logging.WARNING, "jaxllm"):
    got_config, got = params_from_huggingface(hf, encoders.tensors_of(model))
  assert got_config.head == "none"
  assert_same(got, params)
  assert "stand aside" in caplog.text


@pytest.mark.parametrize("name", BART)
def test_bart_without_a_prefix_and_without_a_bias_on_the_logits(name, tmp_path):
  """bart-base's own layout."""
  model, full, config, params = encoders.case(name)
  if config.head != "lm" or not config.tie_embeddings:  # else the head is of the file, or there is none
    return
  hf, bare = saved(model.model, tmp_path)
  got_config, got = params_from_huggingface(hf, bare)
  assert got_config == config
  assert_same(got, params)
  assert ("head/bias" in flat(got)) == config.head_bias
  assert not flat(got).get("head/bias", np.zeros(1)).any()


@pytest.mark.parametrize("name", encoders.ENCODERS)
def test_names_of_norms_in_the_first_files(name):
  """bert-base-uncased's own file has them."""
  model, hf, config, params = encoders.case(name)
  tensors = encoders.tensors_of(model)
  ends = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
  old = {}
  for key, x in tensors.items():
    end = next((end for end in ends if key.endswith(end)), "")
    old[key.removesuffix(end) + ends.get(end, "")] = x
  got_config, got = params_from_huggingface(hf, old)
  assert got_config == config
  jax.tree.map(np.testing.assert_array_equal, got, params)
