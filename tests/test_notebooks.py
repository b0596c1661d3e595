"""Every notebook in experiments/ runs from its first cell to its last, with a tiny model in place of a real one."""

from pathlib import Path

import jax
import pytest

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("reasoning_gym")

NOTEBOOKS = sorted(Path("experiments").glob("*.ipynb"))
TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def base(tmp_path):
  """A random model of bytes with a chat template."""
  import tokenizers

  from jaxllm.data.tokenizers import HuggingFaceTokenizer, byte_alphabet
  from jaxllm.interop.stored import StoredModel, tensors_of
  from jaxllm.interop.write import write_model
  from jaxllm.models.build import init_params
  from jaxllm.models.config import ModelConfig

  rust = tokenizers.Tokenizer(tokenizers.models.BPE(byte_alphabet(), []))
  rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  rust.decoder = tokenizers.decoders.ByteLevel()
  rust.add_special_tokens(["</s>", "<|im_start|>", "<|im_end|>"])
  tokenizer = HuggingFaceTokenizer(rust.to_str(), {"eos_token": "</s>", "chat_template": TEMPLATE})
  config = ModelConfig(vocab_size=260, embed_dim=32, num_layers=2, num_heads=2, max_seq_len=512)
  stored = StoredModel(config, tensors_of(init_params(config, jax.random.key(0))), tokenizer)
  write_model(stored, tmp_path / "base", format="hf")
  return tmp_path / "base"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, base, monkeypatch):
  settings = {"BASE": str(base), "STEPS": "4", "QUESTIONS": "3"}
  for name, value in (settings | {"PYTHONPATH": str(Path.cwd()), "XLA_FLAGS": ""}).items():
    monkeypatch.setenv(name, value)
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
  pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
  assert pictures


def test_there_are_some():
  assert NOTEBOOKS
