"""Checkpoints in fp8 and mxfp4 against what transformers makes of the same bytes."""

import json

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from jaxllm.base.errors import CheckpointError, ConfigError  # noqa: E402
from jaxllm.interop.block_scaled import dequantized  # noqa: E402
from jaxllm.interop.huggingface_directory import open_huggingface, read_huggingface  # noqa: E402
from jaxllm.interop.tensors import in_memory  # noqa: E402

FP8 = {"quant_method": "fp8", "weight_block_size": [4, 3], "fmt": "e4m3"}
DEEPSEEK = dict(
  vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=8,
  qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6, q_lora_rank=8, n_routed_experts=4, num_experts_per_tok=2,
  moe_intermediate_size=8, first_k_dense_replace=1, n_group=2, topk_group=1, num_key_value_heads=2,
  max_position_embeddings=32,
)  # fmt: skip
GPT_OSS = dict(
  vocab_size=40, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
  num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip


def saved(directory, model, tensors, method):
  model.save_pretrained(directory)
  config = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
  save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  return directory


def state(cls, config):
  torch.manual_seed(0)
  model = cls(config).to(torch.bfloat16)
  with torch.no_grad():
    for p in model.parameters():
      p.normal_()
  return model


def test_fp8(tmp_path):
  """Kimi-K2's and DeepSeek-V3's: the quotient of blocks, whose last ones are smaller."""
  model = state(transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config(**DEEPSEEK))
  model.save_pretrained(tmp_path / "plain")
  plain = open_huggingface(tmp_path / "plain")
  _, tensors = read_huggingface(tmp_path / "plain")
  quantized, want = {}, {}
  rng = np.random.default_rng(0)
  for name, tensor in tensors.items():
    x = torch.tensor(tensor.read().astype(np.float32))
    if not name.endswith("_proj.weight"):
      quantized[name] = x.to(torch.bfloat16)
      continue
    rows, columns = x.shape
    scales = torch.tensor(rng.uniform(0.5, 2, (-(-rows // 4), -(-columns // 3))), dtype=torch.float32)
    codes = x.to(torch.float8_e4m3fn)
    quantized |= {name: codes, f"{name}_scale_inv": scales}
    want[name] = torch.stack(
      [torch.stack([codes[i, j].float() * scales[i // 4, j // 3] for j in range(columns)]) for i in range(rows)]
    ).to(torch.bfloat16)
  directory = saved(tmp_path / "fp8", model, quantized, FP8)
  config, got = read_huggingface(directory)
  assert "quantization_config" not in config and got.keys() == tensors.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(got[name].read().astype(np.float32), x.float().numpy(), err_msg=name)
  opened = open_huggingface(directory)
  assert opened.config == plain.config and opened.tensors.keys() == plain.tensors.keys()
  assert {t.dtype for t in opened.tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_mxfp4(tmp_path):
  from transformers.integrations.mxfp4 import convert_moe_packed_tensors

  model = state(transformers.GptOssForCausalLM, transformers.GptOssConfig(**GPT_OSS))
  packed, want, rng = {}, {}, np.random.default_rng(0)
  for name, x in model.state_dict().items():
    if not name.endswith("experts.gate_up_proj") and not name.endswith("experts.down_proj"):
      packed[name] = x.clone()
      continue
    experts, inputs, outputs = x.shape
    blocks = torch.tensor(rng.integers(0, 256, (experts, outputs, inputs // 32, 16)), dtype=torch.uint8)
    scales = torch.tensor(rng.integers(110, 140, (experts, outputs, inputs // 32)), dtype=torch.uint8)
    packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    want[name] = convert_moe_packed_tensors(blocks, scales)
  directory = saved(tmp_path / "mxfp4", model, packed, {"quant_method": "mxfp4", "modules_to_not_convert": []})
  _, got = read_huggingface(directory)
  for name, x in want.items():
    np.testing.assert_array_equal(got[name].read().astype(np.float32), x.float().numpy(), err_msg=name)
  assert open_huggingface(directory).config.moe.bias


def test_what_does_not_fit():
  codes, scales = np.zeros((5, 3), ml_dtypes.float8_e4m3fn), np.ones((2, 1), np.float32)
  with pytest.raises(CheckpointError, match="lacks the tensor w_scale_inv"):
    dequantized(FP8, in_memory({"w": codes}))
  with pytest.raises(CheckpointError, match=r"w_scale_inv has shape \(1, 1\); w calls for \(2, 1\)"):
    dequantized(FP8, in_memory({"w": codes, "w_scale_inv": scales[:1]}))
  with pytest.raises(ConfigError, match="weight_block_size = None"):
    dequantized({"quant_method": "fp8"}, in_memory({"w": codes, "w_scale_inv": scales}))
  with pytest.raises(CheckpointError, match="w_blocks has shape"):
    dequantized({"quant_method": "mxfp4"}, in_memory({"w_blocks": np.zeros((1, 2, 3, 8), np.uint8)}))
