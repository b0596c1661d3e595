"""The example of docs/adding_a_family.md is a family that works, and as short as the page says."""

import re
from pathlib import Path

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoint_arrays import params_from_huggingface, params_to_huggingface  # noqa: E402

from jaxllm.interop import families  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_family.md"
TABLES = Path(families.__file__).parent


@pytest.mark.parametrize("window", [None, 5])
def test_the_example(monkeypatch, window):
  [example] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
  assert len(example.splitlines()) < 80
  names = {}
  exec(example, names)
  monkeypatch.setitem(families.FAMILIES, "starcoder2", names["STARCODER2"])
  config = transformers.Starcoder2Config(
    vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, sliding_window=window,
    bos_token_id=1, eos_token_id=2,
  )  # fmt: skip
  model = oracle.torch_model(transformers.Starcoder2ForCausalLM, config)
  tensors = oracle.tensors_of(model)
  c, params = params_from_huggingface(config.to_dict(), tensors)
  tokens = np.random.default_rng(0).integers(3, 97, (2, 12))
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits.numpy()
  assert want.std() > 0.3
  np.testing.assert_allclose(oracle.forward(c)(params, tokens), want, rtol=0, atol=1e-4)
  hf, again = params_to_huggingface(c, "starcoder2", params)
  assert again.keys() == tensors.keys()
  for name, tensor in again.items():
    np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
  assert params_from_huggingface(hf, again)[0] == c


@pytest.mark.parametrize("name", ["phi3", "smollm3", "olmo2", "gpt2", "gpt_neox", "bloom"])
def test_families_of_one_file_are_short(name):
  assert len((TABLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80
