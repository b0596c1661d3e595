"""Every notebook in experiments/ runs from its first cell to its last, with a tiny model in place of a real one."""

from pathlib import Path

import jax
import nbclient
import nbformat
import pytest
from chat_tokenizer import chat_tokenizer

NOTEBOOKS = sorted(Path("experiments").glob("*.ipynb"))


@pytest.fixture
def base(tmp_path):
  """A random model of bytes with a chat template."""
  from jaxllm.interop.stored import StoredModel, tensors_of
  from jaxllm.interop.write import write_model
  from jaxllm.models.build import init_params
  from jaxllm.models.config import ModelConfig

  config = ModelConfig(vocab_size=260, embed_dim=32, num_layers=2, num_heads=2, max_seq_len=512)
  stored = StoredModel(config, tensors_of(init_params(config, jax.random.key(0))), chat_tokenizer())
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
