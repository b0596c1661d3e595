"""Tensors and configs through GGUF: bit for bit, by the gguf package's own arithmetic, and whole files or none."""

import contextlib
import dataclasses
import errno
import json
import re
import resource
import signal
import tracemalloc

import gguf
import gguf_models
import ml_dtypes
import numpy as np
import pytest

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.families import FAMILIES
from jaxllm.interop.gguf import checkpoint as reading
from jaxllm.interop.gguf import read_gguf, write_gguf, writer
from jaxllm.interop.gguf.architectures import WRITABLE
from jaxllm.interop.gguf.config import as_gguf, read_config
from jaxllm.interop.gguf.encoders import reduced
from jaxllm.interop.gguf.tensors import read_tensors
from jaxllm.interop.huggingface import config_from_huggingface, from_huggingface
from jaxllm.interop.open import open_model
from jaxllm.interop.stored import StoredModel
from jaxllm.interop.tensors import LazyTensor, in_memory
from jaxllm.interop.write import write_model

Kind = gguf.GGMLQuantizationType


def stored(path):
  """name -> (type, bytes) of every tensor, as the gguf package finds it."""
  return {t.name: (t.tensor_type.name, np.asarray(t.data)) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", gguf_models.CONFIGS)
def test_float32_comes_back_bit_for_bit(tmp_path, name):
  hf, tensors = gguf_models.checkpoint(name)
  write_gguf(tmp_path / "x.gguf", hf, tensors, None)
  back = read_gguf(tmp_path / "x.gguf")
  assert back.tensors.keys() == tensors.keys()
  for key, tensor in tensors.items():
    want, got = tensor.read(), back.tensors[key].read()
    if "gemma" in name and key.endswith("norm.weight"):  # the file holds 1 + w, rounded
      want = (want + np.float32(1)) - np.float32(1)
    np.testing.assert_array_equal(got, want, err_msg=key)
  same = {"model_type": hf["model_type"]} | ({"sliding_window": None} if name == "mistral" else {})
  assert config_from_huggingface(back.config | same) == config_from_huggingface(hf)
  from_huggingface(back.config, back.tensors)  # the family's own table finds everything in its place


@pytest.mark.parametrize("name", gguf_models.ENCODERS | gguf_models.ENCODER_DECODERS)
def test_encoders_come_back_without_their_heads(tmp_path, name):
  """BERT's kin as the one that has no more than the file: the same numbers, positions counted from 0, no head."""
  hf, tensors = gguf_models.checkpoint(name)
  write_gguf(tmp_path / "x.gguf", hf, tensors, None)
  back = read_gguf(tmp_path / "x.gguf")
  (config, params), (found, numbers) = from_huggingface(hf, tensors), from_huggingface(back.config, back.tensors)
  if config.architecture == "encoder_decoder":
    assert found == dataclasses.replace(config, logit_scale=None)
  else:
    same = dict(
      head=found.head, head_dense=None, head_norm=False, head_bias=False, position_offset=0, position_pad_id=None
    )
    assert found.head == "none" and found == dataclasses.replace(config, **same)
  assert numbers.keys() == {path for path in params if not path.startswith("head/") or found.head == "lm"}
  for path, tensor in numbers.items():
    want = params[path].read()
    if path == "embedding/positions":
      want = want[config.position_offset :]
    if path == "final_norm/scale" and config.logit_scale:
      want = want * np.float32(config.logit_scale)
    np.testing.assert_array_equal(tensor.read(), want, err_msg=path)


@pytest.mark.parametrize("name", gguf_models.ALL)
def test_names_are_those_of_the_gguf_package(tmp_path, name):
  """Every tensor is one that its tables know of the architecture, and every key is one of its constants."""
  write_gguf(tmp_path / "x.gguf", *gguf_models.checkpoint(name), None)
  reader = gguf.GGUFReader(tmp_path / "x.gguf")
  architecture = reader.fields["general.architecture"].contents()
  kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
  known = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "0") for tensor in gguf.MODEL_TENSORS[kind]}
  stems = {re.sub(r"blk\.\d+\.", "blk.0.", tensor.name.rpartition(".")[0]) for tensor in reader.tensors}
  assert stems <= known | {"rope_freqs", "rope_factors_long", "rope_factors_short"}
  groups = [group for group in vars(gguf.Keys).values() if isinstance(group, type)]
  keys = {key.replace("{arch}", architecture) for group in groups for key in vars(group).values() if type(key) is str}
  # Llama 3's factors, of which llama.cpp reads the tensor; the rest is of later versions of its package.
  ours = {"rope.scaling.low_freq_factor", "rope.scaling.high_freq_factor", "hidden_activation", "rope.freq_base_swa"}
  ours |= {"rope.scaling.attn_factor"}
  assert reader.fields.keys() - keys <= {f"{architecture}.{key}" for key in ours} | {
    "GGUF.version",
    "GGUF.tensor_count",
    "GGUF.kv_count",
  }


@pytest.mark.parametrize("name", gguf_models.RANKERS)
def test_classifiers_come_back_with_their_labels(tmp_path, name):
  hf, tensors = gguf_models.checkpoint(name)
  named = hf | {"id2label": gguf_models.RANKERS[name]["id2label"]}
  model = from_huggingface(named, tensors)
  write_model(StoredModel(*model, source=named), tmp_path / "x.gguf", format="gguf", quantize="q4_0")
  found = read_gguf(tmp_path / "x.gguf")
  assert found.metadata["bert.pooling_type"] == gguf.PoolingType.RANK
  assert found.metadata["bert.classifier.output_labels"] == list(named["id2label"].values())
  kinds = {stem: stored(tmp_path / "x.gguf")[f"{stem}.weight"][0] for stem in ("cls", "cls.output", "blk.0.attn_q")}
  assert list(kinds.values()) == ["F32", "F32", "Q4_0"]
  back = open_model(tmp_path / "x.gguf")
  assert back.config == dataclasses.replace(model[0], position_offset=0, position_pad_id=None) and back.vectors is None
  for path in ("head/dense/weight", "head/dense/bias", "head/weight", "head/bias"):
    np.testing.assert_array_equal(back.tensors[path].read(), model[1][path].read())
  write_model(back, tmp_path / "hf", format="hf")
  assert json.loads((tmp_path / "hf" / "config.json").read_text())["id2label"] == named["id2label"]


BARE = {
  "e5-mistral": gguf_models.CONFIGS["mistral"] | dict(architectures=["MistralModel"]),
  "qwen3-embedding": gguf_models.CONFIGS["qwen3"] | dict(architectures=["Qwen3Model"]),
}


@pytest.mark.parametrize("name", BARE)
def test_decoders_without_a_head_take_their_embedding_for_one(tmp_path, caplog, name):
  hf, tensors = gguf_models.checkpoint(BARE[name])
  write_gguf(tmp_path / "x.gguf", hf, tensors, None)
  assert "has no head" in caplog.records[0].getMessage() and "output.weight" not in stored(tmp_path / "x.gguf")
  back = read_gguf(tmp_path / "x.gguf")
  (config, params), (found, numbers) = from_huggingface(hf, tensors), from_huggingface(back.config, back.tensors)
  assert (config.head, found.head, found.tie_embeddings) == ("none", "lm", True) and params.keys() == numbers.keys()
  for path, tensor in params.items():
    np.testing.assert_array_equal(numbers[path].read(), tensor.read(), err_msg=path)


def test_the_text_of_a_model_that_sees():
  """Gemma 3 with its vision tower is written as its text alone."""
  (hf, tensors), (text, found) = gguf_models.checkpoint("gemma3"), reduced(*gguf_models.checkpoint("gemma3-seeing"))
  assert as_gguf(text, found)[1] == as_gguf(hf, tensors)[1] and found.keys() == tensors.keys()
  for name, tensor in found.items():
    np.testing.assert_array_equal(tensor.read(), tensors[name].read(), err_msg=name)


def test_growth_that_begins_behind_the_context_is_none():
  """Dynamic NTK changes nothing up to the trained length, which is the file's context."""
  hf, tensors = gguf_models.checkpoint("llama")
  grown = hf | dict(rope_scaling=dict(rope_type="dynamic", factor=2.0))
  assert as_gguf(grown, tensors)[1] == as_gguf(hf, tensors)[1]


def test_a_masked_language_model_may_say_how_a_classifier_would_pool():
  """ModernBERT's files do, and none of it is in the states of tokens."""
  hf, tensors = gguf_models.checkpoint(gguf_models.ENCODERS["modernbert"] | dict(classifier_pooling="mean"))
  assert as_gguf(*reduced(hf, tensors))[1] == as_gguf(*reduced(*gguf_models.checkpoint("modernbert")))[1]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_transformers_finds_the_same_weights(tmp_path, name):
  """Its own GGUF reader undoes llama.cpp's order of rows, offsets of norms and transpositions as we do them."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  hf, tensors = gguf_models.checkpoint(name)
  write_gguf(tmp_path / "x.gguf", hf, tensors, None)
  config = transformers.AutoConfig.for_model(**hf)
  load = transformers.AutoModelForCausalLM.from_pretrained
  state = load(tmp_path, gguf_file="x.gguf", config=config, dtype=torch.float32).state_dict()
  for key, tensor in tensors.items():
    exact = not ("gemma" in name and "norm" in key)
    np.testing.assert_allclose(state[key].numpy(), tensor.read(), rtol=0, atol=0 if exact else 2e-7, err_msg=key)


def test_half_precision_comes_back_bit_for_bit(tmp_path):
  for dtype, kind in (("f16", np.float16), ("bf16", ml_dtypes.bfloat16)):
    hf, tensors = gguf_models.checkpoint("llama", kind)
    write_gguf(tmp_path / "x.gguf", hf, tensors, None, dtype=dtype)
    back = read_gguf(tmp_path / "x.gguf").tensors
    for key, tensor in tensors.items():
      assert back[key].dtype == (np.float32 if "norm" in key else kind)
      np.testing.assert_array_equal(back[key].read().astype(np.float32), tensor.read().astype(np.float32), err_msg=key)


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_quantized_as_the_gguf_package_does(tmp_path, monkeypatch, dtype):
  monkeypatch.setattr(writer, "_AT_ONCE", 64 * 7)  # several chunks, the last one shorter
  monkeypatch.setattr(reading, "_AT_ONCE", 64 * 5)
  hf, tensors = gguf_models.checkpoint("qwen2-yarn")
  write_gguf(tmp_path / "x.gguf", hf, tensors, None, dtype=dtype)
  found, back = stored(tmp_path / "x.gguf"), read_gguf(tmp_path / "x.gguf").tensors
  names = {"model.layers.1.self_attn.q_proj": "blk.1.attn_q", "model.embed_tokens": "token_embd", "lm_head": "output"}
  for key, name in names.items():
    want = Kind["Q8_0" if name == "output" else dtype.upper()]
    data = gguf.quants.quantize(tensors[f"{key}.weight"].read(), want)
    kind, raw = found[f"{name}.weight"]
    assert kind == want.name
    np.testing.assert_array_equal(raw, data)
    np.testing.assert_array_equal(back[f"{key}.weight"].read(), gguf.quants.dequantize(data, want))
  for name in ("blk.0.attn_norm.weight", "blk.0.attn_q.bias", "output_norm.weight"):
    assert found[name][0] == "F32"


def test_a_tied_embedding_gets_the_output_type(tmp_path):
  hf, tensors = gguf_models.checkpoint("llama-tied-wide")
  write_gguf(tmp_path / "x.gguf", hf, tensors, None, dtype="q4_0")
  kinds = {name: kind for name, (kind, _) in stored(tmp_path / "x.gguf").items()}
  assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.0.ffn_down.weight"] == "Q4_0"
  assert "output.weight" not in kinds


def test_rows_without_whole_blocks_become_float16(tmp_path, caplog):
  hf, tensors = gguf_models.checkpoint("llama")
  hf = hf | {"intermediate_size": 80}
  cut = {n: t.read()[..., :80] if "down" in n else t.read() for n, t in tensors.items()}
  cut = {n: x[:80] if "gate" in n or "up_proj" in n else x for n, x in cut.items()}
  write_gguf(tmp_path / "x.gguf", hf, in_memory(cut), None, dtype="q8_0")
  kinds = {name: kind for name, (kind, _) in stored(tmp_path / "x.gguf").items()}
  assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"
  assert caplog.records[0].getMessage().endswith("stay float16: blk.0.ffn_down.weight, blk.1.ffn_down.weight")


def strange_file(path, kind, data):
  """A file of one layer whose embedding is these bytes."""
  out = gguf.GGUFWriter(path, "llama")
  numbers = {"block_count": 1, "embedding_length": 256, "context_length": 64, "feed_forward_length": 8}
  for key, value in (numbers | {"attention.head_count": 4}).items():
    out.add_uint32(f"llama.{key}", value)
  out.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
  out.add_tensor("blk.0.attn_norm.weight", np.ones(256, np.float32))
  out.add_tensor("token_embd.weight", data, raw_dtype=Kind[kind])
  out.write_header_to_file()
  out.write_kv_data_to_file()
  out.write_tensors_to_file()
  out.close()


@pytest.mark.parametrize("kind", ["Q5_1", *(kind for kind in reading.QUANTIZED if re.match("Q._K|I|T", kind))])
def test_reads_the_types_that_others_write(tmp_path, monkeypatch, kind):
  monkeypatch.setattr(reading, "_AT_ONCE", 256 * 3)
  block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
  data = np.random.default_rng(0).integers(0, 256, (320, 256 // block * size), np.uint8)
  data[:, 1::2] &= 0x3F  # keeps the float16 scales finite
  data[:, 0::2] &= 0x7B
  strange_file(tmp_path / "x.gguf", kind, data)
  tensor = read_gguf(tmp_path / "x.gguf").tensors["model.embed_tokens.weight"]
  assert tensor.shape == (320, 256) and tensor.dtype == np.float32
  np.testing.assert_array_equal(tensor.read(), gguf.quants.dequantize(data, Kind[kind]))


def test_a_type_that_cannot_be_read_is_named(tmp_path):
  size = gguf.GGML_QUANT_SIZES[Kind.NVFP4][1]
  strange_file(tmp_path / "x.gguf", "NVFP4", np.zeros((320, 256 // 64 * size), np.uint8))
  with pytest.raises(CheckpointError, match="token_embd.weight has the type NVFP4, which cannot be read here"):
    read_gguf(tmp_path / "x.gguf")


def test_experts_of_four_bits(tmp_path):
  """Those of gpt-oss as the gguf package packs them; what MXFP4 can hold comes back bit for bit."""
  hf, tensors = gguf_models.checkpoint("gpt-oss")
  name = "model.layers.1.mlp.experts.down_proj"
  packed = gguf.quants.quantize(tensors[name].read().swapaxes(1, 2), Kind.MXFP4)
  write_gguf(tmp_path / "x.gguf", hf, tensors, None, dtype="mxfp4")
  found = stored(tmp_path / "x.gguf")
  kinds = {stem: found[f"blk.1.{stem}"][0] for stem in ("ffn_gate_exps.weight", "ffn_gate_exps.bias", "attn_q.weight")}
  assert list(kinds.values()) == ["MXFP4", "F32", "BF16"]
  np.testing.assert_array_equal(found["blk.1.ffn_down_exps.weight"][1].reshape(packed.shape), packed)
  back = read_gguf(tmp_path / "x.gguf").tensors
  write_gguf(tmp_path / "again.gguf", hf, back, None, dtype="mxfp4")
  assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()
  with pytest.raises(ConfigError, match="the model has none"):
    write_gguf(tmp_path / "y.gguf", *gguf_models.checkpoint("llama"), None, dtype="mxfp4")


def test_experts_pass_one_by_one(tmp_path):
  """Writing and reading a mixture never holds a whole layer's experts in memory."""
  hf = gguf_models.CONFIGS["qwen3-moe"] | dict(num_experts=64, moe_intermediate_size=128)
  hf, tensors = gguf_models.checkpoint(hf)
  lazy = {name: LazyTensor(t.shape, t.dtype, lambda t=t: t.read().copy()) for name, t in tensors.items()}
  stack = 64 * 128 * 64 * 4  # bytes of one of three
  with tracemalloc_peak() as peak:
    write_gguf(tmp_path / "x.gguf", hf, lazy, None, dtype="q8_0")
  with tracemalloc_peak() as other:
    for tensor in read_gguf(tmp_path / "x.gguf").tensors.values():
      tensor.read()
  assert max(peak[0], other[0]) < stack


@contextlib.contextmanager
def tracemalloc_peak():
  """Yields a list that will hold the bytes that were allocated at most."""
  peak = []
  tracemalloc.start()
  try:
    yield peak
    peak.append(tracemalloc.get_traced_memory()[1])
  finally:
    tracemalloc.stop()


def test_deepseek_files_before_latent_attention_was_split(tmp_path):
  """Older files have kv_b_proj as it is, and the lengths of the heads themselves."""
  hf, tensors = gguf_models.checkpoint("deepseek-v2")
  architecture, metadata, written = as_gguf(hf, tensors)
  old = dict(written)
  for i in range(2):
    del old[f"blk.{i}.attn_k_b.weight"], old[f"blk.{i}.attn_v_b.weight"]
    old[f"blk.{i}.attn_kv_b.weight"] = tensors[f"model.layers.{i}.self_attn.kv_b_proj.weight"]
  lengths = {"deepseek2.attention.key_length": 24, "deepseek2.attention.value_length": 24}
  metadata = {key: value for key, value in metadata.items() if not key.endswith("_mla")} | lengths
  config = read_config(metadata, old)
  assert config_from_huggingface(config) == config_from_huggingface(hf)
  back = read_tensors(config, architecture, old)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(back[name].read(), tensor.read(), err_msg=name)


@pytest.mark.parametrize("name", {hf["model_type"]: name for name, hf in gguf_models.ALL.items()}.values())
def test_no_key_is_passed_over(name, caplog):
  """Each number of the metadata that is another makes another model, or an error, or a line says that it means
  nothing."""
  hf, tensors = reduced(*gguf_models.checkpoint(name))
  architecture, metadata, tensors = as_gguf(hf, tensors)
  config = config_from_huggingface(read_config(metadata, tensors))
  assert not [record for record in caplog.records if "not read here" in record.getMessage()]
  told = {"vocab_size", "expert_feed_forward_length", "feed_forward_length"}  # by the tensors
  told |= {"rope.scaling.type"} if "longrope" in name else {"logit_scale"} if name == "t5" else set()
  told |= (
    {"attention.head_count_kv", "attention.key_length", "attention.value_length"} if architecture.latent else set()
  )
  told |= {"expert_group_count", "expert_group_used_count"} if name == "deepseek-v2" else set()  # greedy
  told |= {"rope.scaling.attn_factor"} if "yarn" in name else set()  # the other spelling goes before it
  for key, value in metadata.items():
    if not key.startswith(f"{architecture.name}.") or key.partition(".")[2] in told:
      continue
    if isinstance(value, str):
      other = "silu" if "activation" in key else "yarn" if value == "none" else "none"
    else:
      other = ~value if isinstance(value, np.ndarray) else not value if isinstance(value, bool) else 2 * value or 1
    with contextlib.suppress(CheckpointError, ConfigError):
      assert config_from_huggingface(read_config(metadata | {key: other}, tensors)) != config, key


def test_keys_of_another_model_are_said(caplog):
  hf, tensors = gguf_models.checkpoint("llama")
  _, metadata, tensors = as_gguf(hf, tensors)
  read_config(metadata | {"llama.attention.clamp_kqv": 8.0, "llama.rope.scaling.finetuned": True}, tensors)
  assert [record.getMessage() for record in caplog.records] == [
    "GGUF: the file has metadata that are not read here: 'attention.clamp_kqv'"
  ]
  with pytest.raises(CheckpointError, match=r"attention.causal otherwise than a decoder"):
    read_config(metadata | {"llama.attention.causal": False}, tensors)
  with pytest.raises(CheckpointError, match=r"rope.dimension_count = 8; a llama model here has 16"):
    read_config(metadata | {"llama.rope.dimension_count": 8}, tensors)


def test_keys_that_are_absent_take_llama_cpp_s_defaults():
  """As its loader has them: key heads, their width, the size of an expert, RoPE."""
  hf, tensors = gguf_models.checkpoint("qwen3-moe")
  _, metadata, tensors = as_gguf(hf, tensors)
  optional = ("head_count_kv", "expert_feed_forward_length", "rope.dimension_count", "vocab_size", "rope.freq_base")
  cut = {key: value for key, value in metadata.items() if not key.endswith(optional)}
  config = read_config(cut, tensors)
  assert config["moe_intermediate_size"] == hf["intermediate_size"] // 2 and config["num_key_value_heads"] == 4
  assert config["rope_theta"] == 10000.0 and "partial_rotary_factor" not in config


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(WRITABLE)))
def test_families_that_llama_cpp_has_no_graph_for(tmp_path, family):
  with pytest.raises(ConfigError, match=f"a {family} model cannot be written as GGUF; those that can are llama, "):
    write_gguf(tmp_path / "x.gguf", {"model_type": family}, {}, None)
  assert not list(tmp_path.iterdir())


def test_llama_rows_lie_as_llama_cpp_rotates_them(tmp_path):
  """Row 2i and 2i + 1 of a head are the pair that Hugging Face keeps at i and i + half."""
  hf, tensors = gguf_models.checkpoint("llama")
  write_gguf(tmp_path / "x.gguf", hf, tensors, None)
  for name, ours in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
    head = tensors[f"model.layers.0.self_attn.{ours}.weight"].read()[16:32]  # the second head, of width 16
    raw = stored(tmp_path / "x.gguf")[f"blk.0.{name}.weight"][1][16:32]
    np.testing.assert_array_equal(raw[0::2], head[:8])
    np.testing.assert_array_equal(raw[1::2], head[8:])


def test_rope_factors_are_llama_3s(tmp_path):
  """At the published numbers of Llama 3.1: high frequencies keep their pace, low ones are 8 times slower."""
  rope = gguf_models.LLAMA3 | {"original_max_position_embeddings": 8192}
  hf, tensors = gguf_models.checkpoint("llama-llama3")
  write_gguf(tmp_path / "x.gguf", hf | {"rope_scaling": rope, "rope_theta": 5e5}, tensors, None)
  factors = stored(tmp_path / "x.gguf")["rope_freqs.weight"][1]
  wavelengths = 2 * np.pi * 5e5 ** (np.arange(0, 16, 2) / 16)
  np.testing.assert_allclose(factors[wavelengths < 2048], 1, rtol=1e-6)
  np.testing.assert_allclose(factors[wavelengths > 8192], 8, rtol=1e-6)


UNSAYABLE = {
  "unnormalized experts": (gguf_models.CONFIGS["qwen3-moe"] | dict(norm_topk_prob=False), "norm_topk_prob"),
  "some plain layers": (gguf_models.CONFIGS["qwen3-moe"] | dict(mlp_only_layers=[0]), "intermediate_size"),
  "other long rope": (dict(model_type="qwen3", head_dim=8, rope_scaling=gguf_models.LONGROPE), "rope_scaling"),
  "yarn's betas": (
    dict(model_type="qwen2", rope_scaling=gguf_models.CONFIGS["qwen2-yarn"]["rope_scaling"] | dict(beta_fast=16.0)),
    "beta_fast = 16.0",
  ),
  "shallow deepseek": (gguf_models.CONFIGS["deepseek-v2"] | dict(num_hidden_layers=3), "without q_lora_rank"),
  "groups of deepseek": (
    gguf_models.CONFIGS["deepseek-v2"] | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2),
    "topk_method",
  ),
  "deepseek's yarn": (
    gguf_models.CONFIGS["deepseek-v2"] | dict(rope_scaling=gguf_models.DEEPSEEK_YARN | dict(mscale_all_dim=0.5)),
    "mscale and mscale_all_dim",
  ),
  "rounded yarn": (
    gguf_models.CONFIGS["gpt-oss"] | dict(rope_scaling=gguf_models.OSS_YARN | dict(truncate=True)),
    "rope_parameters",
  ),
  "other windows": (
    gguf_models.CONFIGS["gpt-oss"] | dict(layer_types=["full_attention", "sliding_attention"] * 2),
    "every other layer",
  ),
  "alibi": (gguf_models.CONFIGS["falcon-7b"] | dict(alibi=True), "alibi"),
  "tags": (gguf_models.ENCODERS["bert"] | dict(architectures=["BertForTokenClassification"]), "the head of"),
  "other classifier": (
    gguf_models.ENCODERS["electra"] | dict(architectures=["ElectraForSequenceClassification"]),
    "the head of",
  ),
  "narrow embedding": (gguf_models.ENCODERS["electra"] | dict(embedding_size=32), "narrower than the model"),
  "distances": (gguf_models.T5 | dict(model_type="t5", relative_attention_max_distance=64), "relative_attention"),
  "long decoder": (gguf_models.T5 | dict(model_type="t5", num_decoder_layers=3), "more layers than its encoder"),
  "silu": (gguf_models.T5 | dict(model_type="t5", feed_forward_proj="gated-silu"), "feed_forward_proj"),
  "query norm": (dict(model_type="cohere", use_qk_norm=True, tie_word_embeddings=True), "use_qk_norm"),
  "activation": (dict(model_type="llama", hidden_act="gelu"), "hidden_act"),
  "plain activation": (dict(model_type="starcoder2", hidden_act="relu"), "starcoder2 has no activation 'relu'"),
  "gated activation": (gguf_models.ENCODERS["modernbert"] | dict(hidden_activation="relu"), "has no activation 'relu'"),
  "qwen llama3": (dict(model_type="qwen2", rope_scaling=gguf_models.LLAMA3), "rope_scaling"),
  "tied olmo2": (dict(model_type="olmo2", tie_word_embeddings=True), "tie_word_embeddings"),
  "biased qwen3": (dict(model_type="qwen3", attention_bias=True), "attention_bias"),
  "gemma2 scale": (gguf_models.GEMMA | dict(model_type="gemma2", query_pre_attn_scalar=99), "query_pre_attn_scalar"),
}


@pytest.mark.parametrize("name", UNSAYABLE)
def test_models_that_llama_cpp_would_compute_differently(tmp_path, name):
  settings, words = UNSAYABLE[name]
  hf, tensors = gguf_models.checkpoint(gguf_models.SMALL | settings)
  with pytest.raises(ConfigError, match=words):
    write_gguf(tmp_path / "x.gguf", hf, tensors, None)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mistral", "phi3", "starcoder2", "mixtral"])
def test_a_window_that_llama_cpp_has_not_is_the_context(tmp_path, caplog, name):
  hf, tensors = gguf_models.checkpoint(name)
  write_gguf(tmp_path / "x.gguf", hf | {"sliding_window": 16}, tensors, None)
  back = config_from_huggingface(read_gguf(tmp_path / "x.gguf").config)
  assert back.max_seq_len == 16 and back.sliding_window is None
  assert [record.getMessage() for record in caplog.records][0].endswith("the file says 16 tokens of context, not 128")


def test_exact_gelu_is_not_what_llama_cpp_has(tmp_path, caplog):
  hf, tensors = gguf_models.checkpoint("gpt-neox")
  write_gguf(tmp_path / "x.gguf", hf | {"hidden_act": "gelu"}, tensors, None)
  assert config_from_huggingface(read_gguf(tmp_path / "x.gguf").config).mlp == "gelu"  # the file says what it was
  assert "tanh approximation" in caplog.records[0].getMessage()


def test_an_expert_that_is_missing(tmp_path):
  hf, tensors = gguf_models.checkpoint("mixtral")
  cut = {name: t for name, t in tensors.items() if ".1.block_sparse_moe.experts.2.w1" not in name}
  with pytest.raises(CheckpointError, match=r"lacks the tensor .*experts.2.w1.* \(blk.1.ffn_gate_exps.weight in GGUF"):
    write_gguf(tmp_path / "x.gguf", hf, cut, None)


def test_checkpoints_that_do_not_fit(tmp_path):
  hf, tensors = gguf_models.checkpoint("llama")
  missing = {n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"}
  with pytest.raises(CheckpointError, match="blk.1.ffn_up.weight"):
    write_gguf(tmp_path / "x.gguf", hf, missing, None)
  with pytest.raises(CheckpointError, match="no place for the tensor model.layers.1"):
    write_gguf(tmp_path / "x.gguf", hf | {"num_hidden_layers": 1}, tensors, None)
  with pytest.raises(CheckpointError, match="no place for the tensor model.extra"):
    write_gguf(tmp_path / "x.gguf", hf, tensors | in_memory({"model.extra.weight": np.ones(3)}), None)
  with pytest.raises(ConfigError, match="not 'q3_k'"):
    write_gguf(tmp_path / "x.gguf", hf, tensors, None, dtype="q3_k")
  large = tensors | in_memory({"lm_head.weight": np.full(tensors["lm_head.weight"].shape, 1e5, np.float32)})
  with pytest.raises(CheckpointError, match="beyond float16"):
    write_gguf(tmp_path / "x.gguf", hf, large, None, dtype="f16")
  assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
  hf, tensors = gguf_models.checkpoint("llama")
  path = tmp_path / "x.gguf"
  path.write_bytes(b"before")

  def interrupt():
    assert [p.name for p in tmp_path.iterdir() if p != path]  # under way, beside it
    raise KeyboardInterrupt

  last = list(tensors)[-1]
  broken = tensors | {last: LazyTensor(tensors[last].shape, tensors[last].dtype, interrupt)}
  with pytest.raises(KeyboardInterrupt):
    write_gguf(path, hf, broken, None)
  assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
  write_gguf(path, hf, tensors, None)
  assert read_gguf(path).config["hidden_size"] == 64 and list(tmp_path.iterdir()) == [path]


def test_a_full_disk(tmp_path):
  hf, tensors = gguf_models.checkpoint("llama")
  before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
  try:
    with pytest.raises(CheckpointError, match="cannot write .*x.gguf") as error:
      write_gguf(tmp_path / "x.gguf", hf, tensors, None)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)
  assert error.value.__cause__.errno == errno.EFBIG
  assert not list(tmp_path.iterdir())


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
  hf, tensors = gguf_models.checkpoint("llama")
  write_gguf(tmp_path / "x.gguf", hf, tensors, None)
  found = read_gguf(tmp_path / "x.gguf")
  with (tmp_path / "x.gguf").open("r+b") as file:
    file.truncate(100)
  with pytest.raises(CheckpointError, match="ends within the tensor"):
    found.tensors["model.embed_tokens.weight"].read()


def test_what_is_said_must_be_there(tmp_path, sentencepiece_bpe):
  hf, tensors = gguf_models.checkpoint("llama")
  write_gguf(tmp_path / "x.gguf", hf, tensors, None)
  data = (tmp_path / "x.gguf").read_bytes()
  for old, new, words in (
    (b"llama.block_count\x04\0\0\0\x02\0\0\0", b"llama.block_count\x04\0\0\0\xff\xff\xff\x7f", "2147483647 layers but"),
    (b"llama.block_count\x04\0\0\0\x02", b"llama.block_count\x04\0\0\0\x03", "3 layers but has tensors of 2"),
    (b"architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama", b"architecture\x08\0\0\0\x05\0\0\0\0\0\0\0mambo", "'mambo'"),
    (b"blk.0.attn_v.weight", b"blk.0.attn_w.weight", "'blk.0.attn_w.weight', which a llama model here has not"),
    (b"llama.context_length", b"llama.context_lengsh", "lacks the metadata llama.context_length"),
  ):
    assert data.count(old) == 1
    (tmp_path / "x.gguf").write_bytes(data.replace(old, new))
    with pytest.raises(CheckpointError, match=words):
      read_gguf(tmp_path / "x.gguf")
