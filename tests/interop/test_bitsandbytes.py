"""Directories that transformers saved with bitsandbytes' 4-bit weights, and its roundings beside ours."""

import dataclasses
import json
import logging
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from peft_models import MODELS, logits

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.inference.load import load_model
from jaxllm.interop.open import open_model
from jaxllm.interop.safetensors import read_safetensors, write_safetensors
from jaxllm.interop.tensors import LazyTensor, in_memory
from jaxllm.kernels import QuantizedWeight, quantize
from jaxllm.kernels.quantized.weights import unpack
from jaxllm.models.quantization import DoubleQuantizedWeight, double_quantize

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

WIDE = {"llama": dict(hidden_size=64, intermediate_size=128), "phi3": dict(hidden_size=64, intermediate_size=128)}
WIDE |= {"gpt2": dict(n_embd=64)}


def test_nf4_is_that_of_bitsandbytes_to_the_bit(agrees):
  torch.manual_seed(0)
  w = torch.randn(96, 256) * torch.rand(96, 1)
  packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
  ours = quantize(jnp.asarray(w.numpy()).T, "nf4", 64)
  codes = np.asarray(unpack(ours.values))
  theirs = packed.numpy().reshape(96, 128)
  agrees("NF4 beside bitsandbytes", "codes", codes, np.stack([theirs >> 4, theirs & 15], -1).reshape(96, 256), 0)
  agrees("NF4 beside bitsandbytes", "absmax", ours.scales.T.reshape(-1), state.absmax.numpy(), 0)


def test_double_quantization_is_that_of_bitsandbytes_but_for_ties(agrees):
  torch.manual_seed(0)
  w = torch.randn(96, 1024) * torch.rand(96, 1)
  _, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
  theirs = (functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).numpy()
  double = double_quantize(quantize(jnp.asarray(w.numpy()).T, "nf4", 64))
  ours = np.asarray(double.single().scales).T.reshape(-1)
  agrees("Double quantization beside bitsandbytes", "nested absmax", double.blocks, state.state2.absmax.numpy())
  different = ~np.isclose(ours, theirs, rtol=0, atol=1e-6)
  assert different.mean() < 0.01  # and these by one step of the map
  step = np.diff(state.state2.code.numpy()).max() * state.state2.absmax.numpy().max()
  assert np.abs(ours - theirs).max() <= step


def exact(model):
  """Logits by bitsandbytes with products in float32, which on CPUs with AVX512-BF16 it rounds to bfloat16."""
  for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
      module.support_avx512bf16_for_cpu = False
  return logits(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """(family, double) -> the directory of a 4-bit model, and its logits and matrices by bitsandbytes."""
  folder, made = tmp_path_factory.mktemp("bnb"), {}

  def make(family, double=False, kind="nf4"):
    directory = folder / f"{family}-{double}-{kind}"
    if directory in made:
      return directory, *made[directory]
    known, settings, _ = MODELS[family]
    config = getattr(transformers, known.split("For")[0].removesuffix("LMHeadModel") + "Config")
    torch.manual_seed(0)
    getattr(transformers, known)(config(**settings | WIDE[family])).save_pretrained(folder / "plain")
    rounding = transformers.BitsAndBytesConfig(
      load_in_4bit=True,
      bnb_4bit_quant_type=kind,
      bnb_4bit_use_double_quant=double,
      bnb_4bit_compute_dtype=torch.float32,
    )
    model = getattr(transformers, known).from_pretrained(
      folder / "plain", quantization_config=rounding, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(directory)
    matrices = {
      name: functional.dequantize_4bit(p.data, p.quant_state).numpy()
      for name, p in model.named_parameters()
      if hasattr(p, "quant_state")
    }
    made[directory] = exact(model), matrices
    return directory, *made[directory]

  return make


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_bitsandbytes_directory_is_read(saved, agrees, family, double):
  directory, want, matrices = saved(family, double)
  subject = f"bitsandbytes directory, {family}{', double quantization' if double else ''}"
  stored = open_model(directory)
  if family == "llama":
    name = "model.layers.1.mlp.down_proj.weight"
    agrees(subject, "a matrix", stored.tensors["blocks/mlp/down/weight"].part((1,)).T, matrices[name], 1e-7)
  model = load_model(directory)
  agrees(subject, "logits, weights in 4 bits", logits(model), want)
  kept = model.params["blocks"]["mlp"]["down"]["weight"]
  assert isinstance(kept, DoubleQuantizedWeight if double else QuantizedWeight)
  plain = {p: LazyTensor(t.shape, t.dtype, t.read, t.stacked, t.read_part) for p, t in stored.tensors.items()}
  dense = dataclasses.replace(stored, tensors=plain).params()
  np.testing.assert_allclose(
    np.asarray(stored.params(per_layer=True)["blocks"]["mlp"]["down"]["weight"].dense()),
    dense["blocks"]["mlp"]["down"]["weight"],
    atol=1e-7,
  )


def test_an_adapter_over_a_bitsandbytes_directory(saved, tmp_path, agrees):
  peft = pytest.importorskip("peft")
  directory, _, _ = saved("llama", True)
  rounding = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
  base = transformers.LlamaForCausalLM.from_pretrained(
    directory, quantization_config=rounding, dtype=torch.float32, device_map={"": "cpu"}
  )
  model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
  torch.manual_seed(1)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.copy_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(tmp_path / "adapter")
  want = exact(model)
  subject = "LoRA of PEFT's over a bitsandbytes directory"
  agrees(subject, "logits, apart", logits(load_model(directory, adapter=tmp_path / "adapter")), want)
  merged = load_model(directory, adapter=tmp_path / "adapter", merge=True)
  agrees(subject, "logits, merged", logits(merged), want)
  assert not isinstance(merged.params["blocks"]["mlp"]["down"]["weight"], DoubleQuantizedWeight)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_int8_bitsandbytes_directory_is_read(tmp_path, agrees, family):
  """The matrices are bitsandbytes' own, and the logits those of a model that has them multiplied out (there the
  activations are rounded too, here they are not)."""
  known, settings, _ = MODELS[family]
  theirs, config = getattr(transformers, known), getattr(transformers, known.split("For")[0] + "Config")
  torch.manual_seed(0)
  theirs(config(**settings | WIDE[family])).save_pretrained(tmp_path / "plain")
  rounding = transformers.BitsAndBytesConfig(load_in_8bit=True)
  model = theirs.from_pretrained(tmp_path / "plain", quantization_config=rounding, device_map={"": "cpu"})
  model.save_pretrained(tmp_path / "int8")
  dense = theirs.from_pretrained(tmp_path / "plain", dtype=torch.float32)
  rounded = {}
  for name, module in model.named_modules():
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
      w = module.weight
      rounded[f"{name}.weight"] = functional.int8_vectorwise_dequant(w.data, w.SCB)
  assert len(rounded) > 4
  dense.load_state_dict(rounded, strict=False)
  stored, ours = open_model(tmp_path / "int8"), load_model(tmp_path / "int8", dtype="float32")
  subject = f"bitsandbytes int8 directory, {family}"
  want = rounded["model.layers.1.mlp.down_proj.weight"].numpy()
  agrees(subject, "a matrix", stored.tensors["blocks/mlp/down/weight"].part((1,)).T, want, 1e-7)
  agrees(subject, "logits", logits(ours), logits(dense))
  kept = ours.params["blocks"]["mlp"]["down"]["weight"]
  assert isinstance(kept, QuantizedWeight) and kept.format == "int8"
  file = tmp_path / "int8" / "model.safetensors"
  tensors = {name: tensor.read() for name, tensor in read_safetensors(file).items()}
  key = "model.layers.0.mlp.down_proj.SCB"
  write_safetensors(file, in_memory(tensors | {key: tensors[key][1:]}))
  with pytest.raises(CheckpointError, match=f"has {key} but no .* of as many rows in int8"):
    open_model(tmp_path / "int8")


def test_fp4_of_bitsandbytes_is_refused(saved):
  with pytest.raises(ConfigError, match="bitsandbytes' fp4, which cannot be read"):
    open_model(saved("llama", kind="fp4")[0])


def test_damaged_bitsandbytes_tensors_are_refused(saved, tmp_path, caplog):
  caplog.set_level(logging.INFO, "jaxllm")
  source = saved("llama", True)[0]
  key = "model.layers.0.mlp.down_proj.weight"
  state = key + ".quant_state.bitsandbytes__nf4"

  def changed(name, change):
    directory = shutil.copytree(source, tmp_path / name)
    file = directory / "model.safetensors"
    tensors = {name: tensor.read() for name, tensor in read_safetensors(file).items()}
    change(tensors)
    write_safetensors(file, in_memory(tensors))
    return directory

  def told(**settings):
    def change(tensors):
      text = json.dumps(json.loads(tensors[state].tobytes()) | settings).encode()
      tensors[state] = np.frombuffer(text, np.uint8)

    return change

  cases = [
    ("absmax", lambda t: t.pop(key + ".absmax"), "has no absmax of 128 numbers"),
    ("codes", lambda t: t.update({key: t[key][:-1]}), "has not 8192 codes"),
    ("weight", lambda t: t.pop(key), f"lacks the tensor {key}"),
    ("shape", told(shape=[64, -1]), "state of the quantized tensor"),
    ("kind", told(shape={"a": 1}), "state of the quantized tensor"),
    ("block", told(blocksize=0), "state of the quantized tensor"),
  ]
  for name, change, message in cases:
    with pytest.raises(CheckpointError, match=message):
      open_model(changed(name, change))
  odd = changed("odd", told(blocksize=64, shape=[128, 64]))
  with pytest.raises(CheckpointError, match="down_proj.weight has shape"):
    open_model(odd)
