"""Tensors and configs through GGUF: bit for bit, by the gguf package's own arithmetic, and whole files or none."""

import errno
import resource
import signal

import gguf
import gguf_models
import ml_dtypes
import numpy as np
import pytest

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.gguf import checkpoint as reading
from jaxllm.interop.gguf import read_gguf, write_gguf, writer
from jaxllm.interop.huggingface import config_from_huggingface, from_huggingface
from jaxllm.interop.tensors import LazyTensor, in_memory

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


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "Q5_1"])
def test_reads_the_types_that_others_write(tmp_path, monkeypatch, kind):
  monkeypatch.setattr(reading, "_AT_ONCE", 256 * 3)
  block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
  data = np.random.default_rng(0).integers(0, 256, (320, 256 // block * size), np.uint8)
  data[:, 1::2] &= 0x3F  # keeps the float16 scales finite
  data[:, 0::2] &= 0x7B
  out = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
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
  tensor = read_gguf(tmp_path / "x.gguf").tensors["model.embed_tokens.weight"]
  assert tensor.shape == (320, 256) and tensor.dtype == np.float32
  np.testing.assert_array_equal(tensor.read(), gguf.quants.dequantize(data, Kind[kind]))


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
  "long rope": (
    dict(model_type="phi3", original_max_position_embeddings=32, pad_token_id=None)
    | dict(rope_scaling=dict(rope_type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8)),
    "original_max_position_embeddings",
  ),
  "query norm": (dict(model_type="cohere", use_qk_norm=True, tie_word_embeddings=True), "use_qk_norm"),
  "activation": (dict(model_type="llama", hidden_act="gelu"), "hidden_act"),
  "qwen llama3": (dict(model_type="qwen2", rope_scaling=gguf_models.LLAMA3), "rope_scaling"),
  "tied olmo2": (dict(model_type="olmo2", tie_word_embeddings=True), "tie_word_embeddings"),
  "biased qwen3": (dict(model_type="qwen3", attention_bias=True), "attention_bias"),
  "gemma2 scale": (gguf_models.GEMMA | dict(model_type="gemma2", query_pre_attn_scalar=99), "query_pre_attn_scalar"),
  "family": (dict(model_type="opt"), "cannot be written as GGUF"),
}


@pytest.mark.parametrize("name", UNSAYABLE)
def test_models_that_llama_cpp_would_compute_differently(tmp_path, name):
  settings, words = UNSAYABLE[name]
  with pytest.raises(ConfigError, match=words):
    write_gguf(tmp_path / "x.gguf", gguf_models.SMALL | settings, {}, None)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mistral", "phi3", "starcoder2", "mixtral"])
def test_a_window_that_llama_cpp_has_not_is_the_context(tmp_path, caplog, name):
  hf, tensors = gguf_models.checkpoint(name)
  write_gguf(tmp_path / "x.gguf", hf | {"sliding_window": 16}, tensors, None)
  back = config_from_huggingface(read_gguf(tmp_path / "x.gguf").config)
  assert back.max_seq_len == 16 and back.sliding_window is None
  assert [record.getMessage() for record in caplog.records][0].endswith("the file says 16 tokens of context, not 128")


def test_exact_gelu_becomes_what_llama_cpp_has(tmp_path, caplog):
  hf, tensors = gguf_models.checkpoint("gpt-neox")
  write_gguf(tmp_path / "x.gguf", hf | {"hidden_act": "gelu"}, tensors, None)
  assert config_from_huggingface(read_gguf(tmp_path / "x.gguf").config).mlp == "gelu_tanh"
  assert "tanh approximation" in caplog.records[0].getMessage()


def test_an_expert_that_is_missing(tmp_path):
  hf, tensors = gguf_models.checkpoint("mixtral")
  cut = {name: t for name, t in tensors.items() if ".1.block_sparse_moe.experts.2.w1" not in name}
  with pytest.raises(CheckpointError, match="lacks an expert of blk.1.ffn_gate_exps.weight"):
    write_gguf(tmp_path / "x.gguf", hf, cut, None)


def test_checkpoints_that_do_not_fit(tmp_path):
  hf, tensors = gguf_models.checkpoint("llama")
  missing = {n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"}
  with pytest.raises(CheckpointError, match="blk.1.ffn_up.weight"):
    write_gguf(tmp_path / "x.gguf", hf, missing, None)
  with pytest.raises(CheckpointError, match="blk.1"):
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
