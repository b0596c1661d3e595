"""Models written by transformers and PEFT, opened, written and given back."""

import json
import shutil

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxllm import load_model  # noqa: E402
from jaxllm.base.errors import CheckpointError, ConfigError, DataError  # noqa: E402
from jaxllm.inference.model import Model  # noqa: E402
from jaxllm.interop.open import family_at, open_model  # noqa: E402
from jaxllm.interop.write import write_model  # noqa: E402
from jaxllm.models.build import init_params  # noqa: E402
from jaxllm.models.config import ModelConfig  # noqa: E402

V = 600
SMALL = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
HF = {
  "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)),
  "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=8)),
  "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
}
DTYPES = {"llama": torch.bfloat16, "qwen3": torch.float32, "gpt2": torch.float16}


def torch_state(directory, dtype="auto"):
  model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
  return {name: tensor for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module", params=HF)
def saved(request, tmp_path_factory):
  """(family, the directory that save_pretrained wrote in several shards)."""
  torch.manual_seed(0)
  directory = tmp_path_factory.mktemp("hf") / request.param
  model = HF[request.param]().to(DTYPES[request.param])
  model.generation_config.temperature = 0.5
  model.generation_config.do_sample = True
  model.save_pretrained(directory, max_shard_size="40KB")
  assert len(list(directory.glob("*.safetensors"))) > 1
  return request.param, directory


def test_to_jaxllm_and_back_is_bit_equal(saved, tmp_path):
  family, directory = saved
  write_model(open_model(directory), tmp_path / "ours", format="jaxllm", max_shard_bytes=50_000)
  write_model(open_model(tmp_path / "ours"), tmp_path / "again", format="hf", max_shard_bytes=40_000)
  want, got = torch_state(directory), torch_state(tmp_path / "again")
  assert want.keys() == got.keys()
  for name, tensor in want.items():
    assert got[name].dtype == tensor.dtype == DTYPES[family]
    assert torch.equal(got[name], tensor), name
  assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == family
  assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["temperature"] == 0.5
  assert open_model(tmp_path / "ours").generation["eos_token_id"] == 2


def test_logits_of_a_loaded_directory(saved):
  family, directory = saved
  tokens = np.random.default_rng(0).integers(3, V, (2, 9))
  model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(load_model(directory, dtype="float32")(tokens), want, atol=1e-4)
  assert jax.tree.leaves(load_model(directory).params)[0].dtype.name == str(DTYPES[family]).removeprefix("torch.")


def test_a_mesh_of_eight(saved):
  _, directory = saved
  from jaxllm.parallel.config import MeshConfig
  from jaxllm.parallel.mesh import make_mesh

  mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices())
  tokens = np.arange(3, 12)[None]
  model = load_model(directory, dtype="float32", mesh=mesh)
  up = model._weights["blocks"]["mlp"]["up"]["weight"][1]
  assert up.addressable_shards[0].data.size * 8 == up.size
  np.testing.assert_allclose(model(tokens), load_model(directory, dtype="float32")(tokens), atol=1e-5)


def test_dtype_is_that_of_the_files(saved, tmp_path):
  _, directory = saved
  write_model(open_model(directory), tmp_path / "f32", format="hf", dtype="float32")
  state, want = torch_state(tmp_path / "f32"), torch_state(directory, torch.float32)
  assert {tensor.dtype for tensor in state.values()} == {torch.float32}
  assert all(torch.equal(state[name], want[name]) for name in want)


def test_the_pipeline_writes_our_greedy_text(sentencepiece, tmp_path):
  config = ModelConfig(
    vocab_size=640, embed_dim=32, num_layers=2, num_heads=2, max_seq_len=64, init_std=0.3, init="normal"
  )
  params = init_params(config, jax.random.key(0))
  # No single bytes: the two libraries show those that are no character in different ways.
  params["embedding"]["tokens"] = params["embedding"]["tokens"].at[:260].set(0).at[600:].set(0)
  model = Model(config, params, sentencepiece["bpe"])
  model.save(tmp_path / "hf", "hf")
  pipe = transformers.pipeline("text-generation", model=str(tmp_path / "hf"), device="cpu")
  for prompt in ("def f(x):", "import os\n\n  ", "é 🎉 你好"):
    theirs = pipe(prompt, max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
    ours = model.generate(prompt, max_tokens=12, temperature=0)[0]
    assert theirs == ours.text and len(ours.token_ids) == 12
  again = load_model(tmp_path / "hf")
  assert (
    again.generate("def f(x):", max_tokens=12, temperature=0)[0].text
    == model.generate("def f(x):", max_tokens=12, temperature=0)[0].text
  )
  assert again.generation["eos_token_id"] == [model.tokenizer.eos_id]


def test_a_tokenizer_json_with_its_template_travels(saved, sentencepiece, tmp_path):
  from jaxllm.data.tokenizers import as_huggingface

  _, directory = saved
  source = shutil.copytree(directory, tmp_path / "source")
  tokenizer = as_huggingface(sentencepiece["bpe"])
  tokenizer.settings["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
  tokenizer.save(source)
  write_model(open_model(source), tmp_path / "ours", format="jaxllm")
  write_model(open_model(tmp_path / "ours"), tmp_path / "hf", format="hf")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi</s>"


def adapter(peft, base, directory, **settings):
  """A random LoRA adapter of a saved model; returns the merged model's tensors by PEFT itself."""
  torch.manual_seed(1)
  model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
  model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.copy_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(directory)
  state = model.merge_and_unload().state_dict()
  return {name: tensor.numpy() for name, tensor in state.items()}


@pytest.mark.parametrize(
  "family, settings",
  [
    ("qwen3", dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])),
    ("qwen3", dict(r=3, use_rslora=True, target_modules="all-linear", modules_to_save=["lm_head"])),
    (
      "qwen3",
      dict(r=4, target_modules=["v_proj", "up_proj", "embed_tokens"], rank_pattern={"layers.1.self_attn.v_proj": 2})
      | dict(alpha_pattern={"up_proj": 20}),
    ),
    ("gpt2", dict(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, bias="lora_only")),
  ],
)
def test_an_adapter_is_merged_as_peft_merges_it(family, settings, tmp_path):
  peft = pytest.importorskip("peft")
  torch.manual_seed(0)
  HF[family]().save_pretrained(tmp_path / "base")
  want = adapter(peft, tmp_path / "base", tmp_path / "adapter", **settings)
  write_model(open_model(tmp_path / "adapter"), tmp_path / "merged", format="hf")
  got = torch_state(tmp_path / "merged")
  base = torch_state(tmp_path / "base")
  assert any(not torch.equal(got[name], base[name]) for name in base)
  for name, tensor in got.items():
    np.testing.assert_allclose(tensor.numpy(), want[name], atol=1e-6, err_msg=name)
  if family == "qwen3":  # an adapter of a model directory
    write_model(open_model(tmp_path / "base"), tmp_path / "ours", format="jaxllm")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "../ours"}))
    again = open_model(tmp_path / "adapter").tensors
    for path, tensor in open_model(tmp_path / "merged").tensors.items():
      np.testing.assert_array_equal(again[path].read(), tensor.read())


@pytest.fixture
def lora(tmp_path):
  peft = pytest.importorskip("peft")
  HF["llama"]().save_pretrained(tmp_path / "base")
  adapter(peft, tmp_path / "base", tmp_path / "adapter", r=2, target_modules=["q_proj"])
  return tmp_path / "adapter"


@pytest.mark.parametrize(
  "change, message",
  [
    ({"peft_type": "IA3"}, "'IA3'; only LORA"),
    ({"use_dora": True}, "q_proj lacks a magnitude"),
    ({"base_model_name_or_path": "someone/model"}, "'someone/model', which is no path"),
    ({"base_model_name_or_path": None}, "does not say what it belongs to"),
  ],
)
def test_other_adapters_are_refused(lora, change, message):
  file = lora / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises((ConfigError, CheckpointError), match=message):
    open_model(lora)


def test_an_adapter_of_another_model_is_refused(lora, tmp_path):
  HF["gpt2"]().save_pretrained(tmp_path / "other")
  shutil.rmtree(tmp_path / "base")
  (tmp_path / "other").rename(tmp_path / "base")
  with pytest.raises(CheckpointError, match="does not fit its base model"):
    open_model(lora)
  (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
  with pytest.raises(CheckpointError, match="no file of PyTorch's tensors"):
    open_model(lora)


def test_a_tokenizer_of_another_model_is_not_written(saved, sentencepiece, tmp_path):
  import dataclasses

  stored = dataclasses.replace(open_model(saved[1]), tokenizer=sentencepiece["bpe"])
  stored = dataclasses.replace(stored, config=dataclasses.replace(stored.config, vocab_size=599))
  with pytest.raises(DataError, match="more tokens"):
    write_model(stored, tmp_path / "x", format="hf")


@pytest.mark.parametrize("said", [{}, {"eos_token_id": [2, 5], "pad_token_id": 7}])
def test_special_ids_of_a_config_come_back(tmp_path, said):
  """Where positions begin hangs on RoBERTa's pad; what generation stops at is another matter."""
  small = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
  small |= dict(max_position_embeddings=34, bos_token_id=3, eos_token_id=2, pad_token_id=1)
  theirs = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**small)).eval()
  theirs.save_pretrained(tmp_path / "hf")
  (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(said))
  write_model(open_model(tmp_path / "hf"), tmp_path / "ours")
  write_model(open_model(tmp_path / "ours"), tmp_path / "again", format="hf")
  again = transformers.RobertaForMaskedLM.from_pretrained(tmp_path / "again").eval()
  assert (again.config.pad_token_id, again.config.bos_token_id) == (1, 3)
  assert again.config.eos_token_id == 2
  ids = torch.tensor([[3, 9, 11, 2]])
  assert torch.equal(theirs(ids).logits, again(ids).logits)
  assert not (tmp_path / "again" / "generation_config.json").exists()  # it writes no text


def test_a_model_directory_knows_by_whose_names_it_was_read(tmp_path):
  config = transformers.MistralConfig(**(SMALL | dict(num_hidden_layers=1)))
  transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "hf")
  write_model(open_model(tmp_path / "hf"), tmp_path / "ours")
  run = {"model": {}, "model_init": {"path": str(tmp_path / "ours")}}
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text(json.dumps(run))
  assert [family_at(tmp_path / name) for name in ("hf", "ours", "run", "none")] == ["mistral"] * 3 + [None]
