"""Adapters that PEFT made are read as what they are, apart and merged; others are refused in one line."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from peft_models import MODELS, changed, load_base, logits, made, save

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.inference.load import load_model
from jaxllm.inference.model import Model
from jaxllm.interop.open import open_model, with_adapter
from jaxllm.interop.peft_write import write_adapter
from jaxllm.interop.safetensors import read_safetensors, write_safetensors
from jaxllm.interop.stored import StoredModel
from jaxllm.interop.tensors import in_memory
from jaxllm.models.config import ModelConfig
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

QV = ["q_proj", "v_proj"]
SETTINGS = {
  "LoRA": ("llama", dict(r=4, lora_alpha=6, target_modules=QV)),
  "rsLoRA": ("llama", dict(r=4, lora_alpha=6, use_rslora=True, target_modules=QV)),
  "DoRA": ("llama", dict(r=4, lora_alpha=6, use_dora=True, target_modules=[*QV, "down_proj"])),
  "DoRA of Conv1D": ("gpt2", dict(r=4, use_dora=True, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
  "DoRA of fused matrices": ("phi3", dict(r=4, use_dora=True, target_modules=["qkv_proj", "gate_up_proj"])),
  "ranks and scales by pattern": (
    "llama",
    dict(r=4, target_modules=[*QV, "up_proj"], rank_pattern={"layers.1.self_attn.q_proj": 2, "up_proj": 6})
    | dict(alpha_pattern={r".*\.0\..*v_proj": 20}),
  ),
  "some layers": ("llama", dict(r=4, target_modules=QV, layers_to_transform=[1], layers_pattern="layers")),
  "DoRA of some layers": ("llama", dict(r=4, use_dora=True, target_modules=QV, layers_to_transform=1)),
  "excluded modules": ("llama", dict(r=4, target_modules="all-linear", exclude_modules=r".*\.1\.mlp\..*")),
  "excluded names": ("llama", dict(r=4, target_modules="all-linear", exclude_modules=["down_proj"])),
  "a regular expression": ("llama", dict(r=4, target_modules=r".*layers\.\d+\.(self_attn\.[qk]_proj|mlp\.up_proj)")),
  "all linear modules": ("phi3", dict(r=4, target_modules="all-linear")),
  "a saved head": ("llama", dict(r=4, target_modules=QV, modules_to_save=["lm_head", "norm"])),
  "embeddings": ("llama", dict(r=4, target_modules=["embed_tokens", "lm_head", "o_proj"])),
  "DoRA of embeddings": ("llama", dict(r=4, use_dora=True, target_modules=["embed_tokens", "q_proj"])),
  "tied embeddings": ("tied", dict(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
  "an embedding without its head": ("tied", dict(r=4, target_modules=["embed_tokens", "q_proj"])),
  "a head without its embedding": ("tied", dict(r=4, target_modules=["lm_head", "q_proj"])),
  "a saved table of two": ("tied", dict(r=4, target_modules=QV, modules_to_save=["embed_tokens"])),
  "two saved tables of one": ("tied", dict(r=4, target_modules=QV, modules_to_save=["embed_tokens", "lm_head"])),
  "a saved table for both": (
    "tied",
    dict(r=4, target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
  ),
  "DoRA of tied tables": (
    "tied",
    dict(r=4, use_dora=True, target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True),
  ),
  "biases of the factors": ("gpt2", dict(r=4, target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True)),
  "rows of tokens": ("llama", dict(r=4, target_modules=QV, trainable_token_indices=[3, 5])),
  "rows of tokens for both": ("tied", dict(r=4, target_modules=QV, trainable_token_indices=[3, 5])),
  "rows of each table": (
    "tied",
    dict(r=4, target_modules=QV, trainable_token_indices={"embed_tokens": [3, 5], "lm_head": [6, 3, 9]}),
  ),
  "rows of GPT-2's": (
    "gpt2",
    dict(r=4, target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices={"wte": [30, 3]}),
  ),
  "a classifier": ("bert", dict(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")),
  "an encoder and a decoder": ("t5", dict(r=4, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_that_peft_made(tmp_path, agrees, name):
  family, settings = SETTINGS[name]
  base, adapter, want = made(family, tmp_path, **settings)
  agrees(f"{name} of PEFT's, {family}", "logits, apart", logits(load_model(base, adapter=adapter)), want)
  agrees(f"{name} of PEFT's, {family}", "logits, merged", logits(load_model(base, adapter=adapter, merge=True)), want)
  assert np.abs(logits(load_model(base)) - want).max() > 1e-2


@pytest.mark.parametrize(
  "name", ["an embedding without its head", "a saved table of two", "tied embeddings", "rows of each table"]
)
def test_an_adapter_of_tied_tables_merged_and_exported(tmp_path, agrees, name):
  """The export is tied where the trained model was, and has two tables where it had: not one that has both changes."""
  family, settings = SETTINGS[name]
  base, adapter, want = made(family, tmp_path, **settings)
  load_model(base, adapter=adapter, merge=True).save(tmp_path / "merged", format="hf")
  tied = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
  assert tied == (name == "tied embeddings")
  agrees(f"{name} of PEFT's, {family}", "logits, exported", logits(load_base(tmp_path / "merged")), want)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "ranks and scales by pattern", "DoRA of some layers"])
def test_on_a_mesh(tmp_path, agrees, name):
  """8 devices, matrices split both ways."""
  base, adapter, want = made("llama", tmp_path, **SETTINGS[name][1])
  model = load_model(base, adapter=adapter, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
  assert any(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(model.params))
  agrees(f"{name} of PEFT's, 8 devices", "logits", logits(model), want)
  again = Model(model.config, model.params)
  agrees(f"{name} of PEFT's, 8 devices", "logits of its params", logits(again), want)


def test_pissa_that_peft_made_and_saved_as_lora(tmp_path, agrees):
  base = save("llama", tmp_path / "base")
  config = peft.LoraConfig(r=4, target_modules=QV, init_lora_weights="pissa")
  model = peft.get_peft_model(load_base(base), config)
  config.init_lora_weights = True
  model.save_pretrained(tmp_path / "start")
  want = logits(changed(model))
  config.init_lora_weights = "pissa_niter_4"
  model.save_pretrained(tmp_path / "pissa")
  with pytest.raises(ConfigError, match="init_lora_weights = 'pissa_niter_4', so it belongs to a base that was"):
    open_model(base, adapter=tmp_path / "pissa")
  model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
  agrees("PiSSA of PEFT's as LoRA", "logits", logits(load_model(base, adapter=tmp_path / "lora")), want)


def test_a_weighted_sum_is_that_of_peft(tmp_path, agrees):
  """Adapters of different ranks and modules, as add_weighted_adapter puts them together with "cat"."""
  base = save("llama", tmp_path / "base")
  model = peft.get_peft_model(load_base(base), peft.LoraConfig(r=4, target_modules=QV), "a")
  model.add_adapter("b", peft.LoraConfig(r=2, lora_alpha=6, target_modules=QV))
  torch.manual_seed(1)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if "lora_" in name:
        parameter.copy_(0.2 * torch.randn_like(parameter))
  model.save_pretrained(tmp_path / "adapters")
  for weights in ((1.0, 1.0), (1.0, 0.5), (-0.25, 2.0)):
    both = [(tmp_path / "adapters" / name, weight) for name, weight in zip("ab", weights)]
    if "sum" in model.peft_config:
      model.delete_adapter("sum")
    model.add_weighted_adapter(["a", "b"], list(weights), "sum", combination_type="cat")
    model.set_adapter("sum")
    want, subject = logits(model), "Two adapters, {} and {} of them, beside PEFT's".format(*weights)
    agrees(subject, "logits, apart", logits(load_model(base, adapter=both)), want)
    agrees(subject, "logits, merged", logits(load_model(base, adapter=both, merge=True)), want)


def test_a_head_that_peft_saves_as_it_is_in_the_base_is_no_change(tmp_path):
  """PEFT saves the base's own matrix of a head beside the factors: halves of such an adapter add up."""
  base, adapter, wanted = made("llama", tmp_path, r=4, target_modules=["lm_head", "q_proj"])
  assert "base_model.model.lm_head.base_layer.weight" in read_safetensors(adapter / "adapter_model.safetensors")
  halves = load_model(base, adapter=[(adapter, 0.5), (adapter, 0.5)])
  np.testing.assert_allclose(logits(halves), wanted, atol=1e-5)


def test_weights_of_peft_adapters_that_are_no_sums_are_refused(tmp_path):
  base, adapter, _ = made("llama", tmp_path, **SETTINGS["DoRA"][1])
  with pytest.raises(ConfigError, match="has magnitudes .DoRA., so it cannot be taken with a weight of 0.5"):
    open_model(base, adapter=[(adapter, 0.5)])
  with pytest.raises(ConfigError, match="is nan; it must be a number"):
    open_model(base, adapter=[(adapter, float("nan"))])


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
  folder = tmp_path_factory.mktemp("lora")
  return made("llama", folder, r=4, target_modules=QV)[:2]


def spoiled(lora, tmp_path, change=lambda tensors: tensors, **settings):
  """The adapter with other settings, or tensors."""
  adapter = shutil.copytree(lora[1], tmp_path / "adapter")
  file = adapter / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | settings))
  file = adapter / "adapter_model.safetensors"
  tensors = {name: tensor.read() for name, tensor in read_safetensors(file).items()}
  write_safetensors(file, in_memory(change(tensors)))
  return adapter


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda t: {n: x for n, x in t.items() if n != FIRST}, r"layers.0.self_attn.q_proj lacks .lora_A.weight"),
    (lambda t: {n: x for n, x in t.items() if "0.self_attn.q" not in n}, "lacks the weights of .*layers.0.*q_proj"),
    (lambda t: t | {FIRST.replace("q_proj", "o_proj"): t[FIRST]}, "o_proj lacks .lora_B|weights of .*o_proj"),
    (lambda t: t | {FIRST.replace("layers.0", "layers.7"): t[FIRST]}, "has no model.layers.7.self_attn.q_proj"),
    (lambda t: t | {"a\nb\x1b[31m.weight": t[FIRST]}, r"names a tensor 'a\\nb\\x1b\[31m"),
    (lambda t: t | {FIRST: t[FIRST][:3]}, r"lora_A.weight of shape \(3, 32\), but \(4, 32\)"),
    (lambda t: t | {FIRST: t[FIRST][:, :8]}, r"of shape \(4, 8\)"),
    (lambda t: {}, "has no tensors"),
  ],
)
def test_tensors_that_do_not_fit_are_listed_for_peft_adapters(lora, tmp_path, change, message):
  adapter = spoiled(lora, tmp_path, change)
  with pytest.raises(CheckpointError, match=message) as raised:
    open_model(lora[0], adapter=adapter)
  assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
  "settings",
  [
    {"r": -1},
    {"r": 10**12},
    {"r": 10**400},
    {"r": 2.5},
    {"r": "four"},
    {"r": True},
    {"lora_alpha": float("nan")},
    {"lora_alpha": 10**400},
    {"lora_alpha": None, "rank_pattern": {"q_proj": 0}},
    {"rank_pattern": ["q_proj"]},
    {"rank_pattern": {"(": 4}},
    {"rank_pattern": {"(?i)q_proj": 4}},
    {"alpha_pattern": {"q_proj": "x\ny"}},
    {"target_modules": 5},
    {"target_modules": ["q_proj", 5]},
    {"target_modules": "(" * 5000},
    {"target_modules": "(?:(?:[a-z]+\\.?)+)+!"},
    {"target_modules": ".*.*.*.*.*.*.*.*.*.*.*.*.*.*!"},
    {"rank_pattern": {"((a|[a-z_.0-9])+)+!": 4}},
    {"exclude_modules": {"a": 1}},
    {"layers_to_transform": ["x"]},
    {"layers_to_transform": [0], "layers_pattern": "((l|[a-z.]+)+)+!"},
    {"modules_to_save": "lm_head\n"},
    {"use_dora": "yes"},
    {"peft_type": ["\ud800\n"]},
    {"lora_dropout": 1},
    {"layer_replication": [[0, 4]]},
    {"target_parameters": ["x"]},
  ],
  ids=lambda settings: ascii(settings)[:40],
)
def test_strange_settings_of_peft_adapters_are_refused_in_a_line(lora, tmp_path, settings):
  with pytest.raises((ConfigError, CheckpointError)) as raised:
    open_model(lora[0], adapter=spoiled(lora, tmp_path, **settings))
  assert str(raised.value).isprintable() and len(str(raised.value)) < 600


@pytest.mark.parametrize("base", ["a" * 5000, "~nobody-of-that-name/x", "\ud800", "x\0y", "", None, 5, ["x"]])
def test_a_base_that_is_no_path_of_a_peft_adapter(lora, tmp_path, base):
  others = {None: "does not say what it belongs to", "\ud800": "half of a character"}
  said = others[base] if base in (None, "\ud800") else "which is no path to another model here"
  with pytest.raises(CheckpointError, match=said) as raised:
    open_model(spoiled(lora, tmp_path, base_model_name_or_path=base))
  assert str(raised.value).isprintable()


def test_a_run_s_own_adapter_is_not_taken_twice(tmp_path):
  base = StoredModel(ModelConfig(), {}, path=tmp_path, form="run")
  (tmp_path / "adapter").mkdir()
  (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
  with pytest.raises(ConfigError, match="adapter is what .* has trained, which is in its weights already"):
    with_adapter(base, tmp_path / "adapter")
  with pytest.raises(CheckpointError, match="is no adapter: .*; there is one in .*adapter$"):
    with_adapter(dataclasses.replace(base, form="jaxllm"), tmp_path)


def test_peft_adapters_that_are_each_other_s_base(tmp_path):
  for own, other in (("a", "b"), ("b", "a")):
    (tmp_path / own).mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / other)}
    (tmp_path / own / "adapter_config.json").write_text(json.dumps(settings))
  with pytest.raises(CheckpointError, match="has no base but adapters"):
    open_model(tmp_path / "a")


def test_a_config_of_a_peft_adapter_that_is_too_deep(lora, tmp_path):
  adapter = spoiled(lora, tmp_path)
  (adapter / "adapter_config.json").write_text("[" * 100_000)
  with pytest.raises(CheckpointError, match="cannot read"):
    open_model(lora[0], adapter=adapter)


def test_a_peft_adapter_of_another_model(lora, tmp_path):
  for family, message in (("gpt2", "has no model.layers.0.self_attn.q_proj"), ("phi3", "has no model.layers.0")):
    with pytest.raises(CheckpointError, match=message):
      open_model(save(family, tmp_path / family), adapter=lora[1])
  wide = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODELS["llama"][1] | {"hidden_size": 64}))
  wide.save_pretrained(tmp_path / "wide")
  with pytest.raises(CheckpointError, match=r"of shape \(4, 32\), but \(4, 64\) are called for"):
    open_model(tmp_path / "wide", adapter=lora[1])


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "ranks and scales by pattern", "DoRA of fused matrices"])
def test_a_peft_adapter_read_and_written_has_its_own_numbers(tmp_path, name):
  """Keys and factors are PEFT's to the bit, and so is every scale."""
  family, settings = SETTINGS[name]
  base, adapter, _ = made(family, tmp_path, **settings)
  stored = open_model(base, adapter=adapter, merge=False)
  write_adapter(tmp_path / "again", stored.config, stored.apart[0].changes, family=MODELS[family][2])
  want, got = (read_safetensors(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "again"))
  assert want.keys() == got.keys()
  for key in want:
    np.testing.assert_array_equal(got[key].read(), want[key].read())
  again = open_model(base, adapter=tmp_path / "again", merge=False)
  for path, change in stored.apart[0].changes.items():
    np.testing.assert_array_equal(again.apart[0].changes[path].scales, change.scales)
