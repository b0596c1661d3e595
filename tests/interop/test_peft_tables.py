"""Embeddings and heads of adapters that PEFT made, tied or not, resized, saved whole; and what is not in the factors.

Merged here and written as a model of transformers, which has to be PEFT's.
"""

import json

import numpy as np
import pytest
from peft_models import IDS, MODELS, changed, load_base, logits, made, save

from jaxllm.base.errors import CheckpointError
from jaxllm.interop.huggingface_directory import as_checkpoint
from jaxllm.interop.open import open_model
from jaxllm.interop.safetensors import read_safetensors, write_safetensors
from jaxllm.interop.tensors import in_memory

peft = pytest.importorskip("peft")

QV = ["q_proj", "v_proj"]
TABLES = dict(target_modules=["embed_tokens", "lm_head"])
SETTINGS = {
  "scales that are not tied": (
    "tied",
    dict(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True, alpha_pattern={"lm_head": 20}),
  ),
  "a saved table among the targets": (
    "tied",
    dict(target_modules=["embed_tokens", "lm_head", "q_proj"], modules_to_save=["embed_tokens"]),
  ),
  "targets that the model has not": ("llama", dict(target_modules=[*QV, "c_attn", "embed_out"])),
  "a layer, and a whole name": (
    "llama",
    dict(target_modules=["q_proj", "lm_head"], layers_to_transform=[1], layers_pattern="layers"),
  ),
  "GPT-2's table, not tied": (
    "gpt2",
    dict(target_modules=["c_attn", "wte"], fan_in_fan_out=True, ensure_weight_tying=True),
  ),
  "projections for training alone": ("llama", dict(target_modules=QV, velora_config={"num_groups": 4})),
  "a table that no one looks up": ("t5", dict(target_modules=["q", "shared", "lm_head"])),
  "biases of both": ("bert", dict(lora_alpha=6, target_modules=["query"], lora_bias=True, bias="all")),
}


def opened(base, adapter, family, folder):
  """The model with the adapter in it, as a module of transformers."""
  model = open_model(base, adapter=adapter)
  config, tensors = as_checkpoint(model, MODELS[family][2])
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config))
  write_safetensors(folder / "model.safetensors", tensors)
  return load_base(folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_tables_of_a_peft_adapter(tmp_path, agrees, name):
  family, settings = SETTINGS[name]
  base, adapter, want = made(family, tmp_path, **dict(r=4) | settings)
  agrees(f"{name} of PEFT's, {family}", "logits", logits(opened(base, adapter, family, tmp_path / "ours")), want)


@pytest.mark.parametrize(
  "family, init, settings",
  [
    ("llama", "pissa", dict(target_modules=[*QV, "down_proj"], use_rslora=True)),
    ("llama", "olora", dict(target_modules=[*QV, "down_proj"], lora_alpha=6)),
    ("phi3", "pissa", dict(target_modules=["qkv_proj", "lm_head"], use_dora=True)),
    ("gpt2", "pissa", dict(target_modules=["c_attn"], fan_in_fan_out=True)),
    ("tied", "pissa", dict(target_modules=["lm_head"])),
  ],
)
def test_factors_of_peft_that_began_as_a_part_of_the_base(tmp_path, agrees, family, init, settings):
  """PEFT takes that part off the base, when the adapter is made and again when it is read."""
  base = save(family, tmp_path / "base")
  model = peft.get_peft_model(load_base(base), peft.LoraConfig(r=4, init_lora_weights=init, **settings))
  changed(model).save_pretrained(tmp_path / "adapter")
  again = peft.PeftModel.from_pretrained(load_base(base), tmp_path / "adapter")
  ours = opened(base, tmp_path / "adapter", family, tmp_path / "ours")
  agrees(f"{init} of PEFT's, {family}", "logits", logits(ours), logits(again))
  np.testing.assert_allclose(logits(again), logits(model), atol=1e-4)


def resized(tmp_path, family, size, how="auto", **settings):
  """The directories of a base and of an adapter for it with another vocabulary, and the adapted model."""
  base = save(family, tmp_path / "base")
  model = load_base(base)
  model.resize_token_embeddings(size)
  model = changed(peft.get_peft_model(model, peft.LoraConfig(**dict(r=4, target_modules=QV) | settings)))
  model.save_pretrained(tmp_path / "adapter", save_embedding_layers=how)
  return base, tmp_path / "adapter", model


@pytest.mark.parametrize(
  "family, size, settings",
  [
    ("llama", 44, dict(modules_to_save=["embed_tokens", "lm_head"])),
    ("llama", 44, dict()),
    ("llama", 44, dict(trainable_token_indices=[40, 43, 7])),
    ("llama", 44, TABLES),
    ("llama", 44, TABLES | dict(modules_to_save=["embed_tokens"])),
    ("llama", 36, dict(target_modules=["q_proj", "lm_head"])),
    ("tied", 44, dict()),
    ("tied", 44, dict(how=True)),
    ("tied", 44, dict(modules_to_save=["embed_tokens"])),
    ("tied", 44, dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    ("tied", 44, dict(trainable_token_indices=[40, 43, 7])),
    ("tied", 44, dict(trainable_token_indices={"embed_tokens": [40, 43, 7]})),
    ("tied", 44, dict(target_modules=["q_proj", "lm_head"])),
    ("tied", 44, dict(target_modules=".*(q_proj|embed_tokens)")),
    ("tied", 44, TABLES | dict(use_dora=True, ensure_weight_tying=True)),
    ("tied", 44, TABLES | dict(ensure_weight_tying=True)),
    ("gpt2", 44, dict(target_modules=["c_attn", "wte"], fan_in_fan_out=True)),
  ],
  ids=str,
)
def test_an_adapter_with_new_tokens_that_peft_made(tmp_path, agrees, family, size, settings):
  """Trained on a model whose vocabulary had grown or shrunk: the rows are in the adapter, the base has others."""
  base, adapter, model = resized(tmp_path, family, size, **settings)
  ours = opened(base, adapter, family, tmp_path / "ours")
  assert ours.config.vocab_size == size
  ids = np.minimum(IDS, size - 1)
  ids[0, :3] = [size - 1, size - 2, 7]
  what = f"{size} tokens of PEFT's, {family}{''.join(f', {name}' for name in settings)}"
  agrees(what, "logits", logits(ours, ids), logits(model, ids))


@pytest.mark.parametrize("settings", [TABLES | dict(how=False), dict(target_modules=["q_proj", "lm_head"])], ids=str)
def test_a_peft_adapter_without_the_rows_of_new_tokens_is_refused(tmp_path, settings):
  """They were drawn when it began: who has the model with new tokens can save that."""
  base, adapter, model = resized(tmp_path, "llama", 44, **settings)
  with pytest.raises(CheckpointError, match="trained on a model with 44 tokens and has no model.embed_tokens of"):
    open_model(base, adapter=adapter)
  model.unload().save_pretrained(tmp_path / "resized")
  ours = opened(tmp_path / "resized", adapter, "llama", tmp_path / "ours")
  again = peft.PeftModel.from_pretrained(load_base(tmp_path / "resized"), adapter)
  np.testing.assert_allclose(logits(ours), logits(again), atol=1e-5)


def test_what_changes_both_tables_changes_both_after_another_has_made_two_of_them(tmp_path):
  base, head, _ = made("tied", tmp_path / "head", r=4, target_modules=["lm_head"])
  _, rows, _ = made("tied", tmp_path / "rows", r=4, target_modules=QV, trainable_token_indices=[7, 9])
  by_names = [], [head], [rows], [head, rows]
  plain, untied, trained, both = (open_model(base, adapter=names).tensors for names in by_names)
  table = "embedding/tokens"
  change = untied["head/weight"].read() - plain[table].read().T
  np.testing.assert_array_equal(both[table].read(), trained[table].read())
  np.testing.assert_allclose(both["head/weight"].read(), trained[table].read().T + change, atol=1e-6)


def test_a_table_that_is_named_and_not_in_the_file_is_said(tmp_path, caplog):
  """PEFT leaves it as it is in the base, and so does this package."""
  base, adapter, _ = made("llama", tmp_path, r=4, target_modules=[*QV, "lm_head"])
  open_model(base, adapter=adapter)
  assert "has no weights of it" not in caplog.text
  file = adapter / "adapter_model.safetensors"
  kept = {name: tensor.read() for name, tensor in read_safetensors(file).items() if "lm_head" not in name}
  write_safetensors(file, in_memory(kept))
  again = peft.PeftModel.from_pretrained(load_base(base), adapter)
  np.testing.assert_allclose(logits(opened(base, adapter, "llama", tmp_path / "ours")), logits(again), atol=1e-5)
  assert "names lm_head and has no weights of it" in caplog.text


def test_a_bias_of_factors_where_the_base_has_none_is_refused(tmp_path):
  base, adapter, _ = made("llama", tmp_path, r=4, target_modules=QV, lora_bias=True)
  with pytest.raises(CheckpointError, match="layers.0.self_attn.q_proj has no bias in the base, and its factors have"):
    open_model(base, adapter=adapter)
