"""A Hugging Face model that is read and written is the same model again: its family, its class, its labels' names."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import test_decoder_families as decoders  # noqa: E402
import test_encoder_families as encoders  # noqa: E402

from jaxllm.interop.open import open_model  # noqa: E402
from jaxllm.interop.write import write_model  # noqa: E402

DECODERS = decoders.NEWER | decoders.OLDER
ENCODERS = encoders.ENCODERS | encoders.ENCODER_DECODERS
NAMES = ["bad", "good", "so so", "none", "other"]


def model_of(name):
  return (decoders if name in DECODERS else encoders).case(name)[0]


def outputs(model, tokens):
  """All tensors that a model gives back for some tokens."""
  more = {"decoder_input_ids": tokens.flip(0)} if model.config.is_encoder_decoder else {}
  with torch.no_grad():
    out = model(tokens, attention_mask=torch.ones_like(tokens), **more)
  return {key: x for key, x in out.items() if isinstance(x, torch.Tensor)}


@pytest.mark.parametrize("name", DECODERS | ENCODERS)
def test_again(name, tmp_path):
  """Through a model directory too, and read back by the class that config.json names."""
  model = model_of(name)
  model.save_pretrained(tmp_path / "first")
  hf = json.loads((tmp_path / "first" / "config.json").read_text())
  if "T5" in hf["architectures"][0]:  # its class forgets it
    hf["tie_word_embeddings"] = ENCODERS[name][1].get("tie_word_embeddings", True)
  classifies = any(word in hf["architectures"][0] for word in ("Sequence", "Token"))
  labels = len(hf.get("id2label") or NAMES[:2]) if classifies else 0
  if labels:
    hf["id2label"] = {str(i): NAMES[i] for i in range(labels)}
    hf["label2id"] = {NAMES[i]: i for i in range(labels)}
  (tmp_path / "first" / "config.json").write_text(json.dumps(hf))
  write_model(open_model(tmp_path / "first"), tmp_path / "ours")
  opened = open_model(tmp_path / "ours")
  write_model(opened, tmp_path / "again", format="hf")
  written = json.loads((tmp_path / "again" / "config.json").read_text())
  assert (written["model_type"], written["architectures"]) == (hf["model_type"], hf["architectures"])
  if labels:
    assert (written["id2label"], written["label2id"]) == (hf["id2label"], hf["label2id"])
  cls = getattr(transformers, written["architectures"][0])
  attention = model.config._attn_implementation
  again, info = cls.from_pretrained(tmp_path / "again", attn_implementation=attention, output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  first = cls.from_pretrained(tmp_path / "first", attn_implementation=attention)
  if labels:
    assert again.config.id2label == {i: NAMES[i] for i in range(labels)}
  tokens = torch.tensor(np.random.default_rng(4).integers(3, 97, (2, 11)))
  tokens[:, -1] = 2  # the end, which BART's classifier reads
  want, got = outputs(first.eval(), tokens), outputs(again.eval(), tokens)
  assert got.keys() == want.keys()
  for key, x in want.items():
    # The same weights; where they lie in memory decides torch's last bits.
    np.testing.assert_allclose(got[key].numpy(), x.numpy(), rtol=1e-6, atol=1e-6, err_msg=key)


def test_a_family_that_cannot_express_it_any_more(tmp_path, caplog):
  """It is written as another, and a line says why."""
  model_of("mistral").save_pretrained(tmp_path / "first")
  opened = open_model(tmp_path / "first")
  write_model(dataclasses.replace(opened, source={"model_type": "gpt2"}), tmp_path / "again", format="hf")
  written = json.loads((tmp_path / "again" / "config.json").read_text())
  assert written["model_type"] == "mistral"
  assert "written as mistral, because a gpt2 checkpoint" in caplog.text


def test_labels_of_another_head_are_not_kept(tmp_path):
  model_of("bert-sequence").save_pretrained(tmp_path / "first")
  opened = open_model(tmp_path / "first")
  assert set(opened.source) >= {"model_type", "id2label", "label2id"}
  config = dataclasses.replace(opened.config, num_labels=2)
  tensors = dict(opened.tensors)
  for path in ("head/weight", "head/bias"):
    tensor = tensors[path]
    half = (*tensor.shape[:-1], 2)
    tensors[path] = dataclasses.replace(tensor, shape=half, read=lambda tensor=tensor: tensor.read()[..., :2])
  write_model(dataclasses.replace(opened, config=config, tensors=tensors), tmp_path / "again", format="hf")
  written = json.loads((tmp_path / "again" / "config.json").read_text())
  assert written["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
