"""How a text's states become one vector, through GGUF; that llama.cpp makes the same of it, its own tests show."""

import dataclasses

import gguf
import gguf_models
import numpy as np
import pytest

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.gguf import read_gguf, write_gguf
from jaxllm.interop.open import open_model
from jaxllm.interop.sentence_transformers import Dense, TextVectors, read_text_vectors
from jaxllm.interop.write import write_model

UNIT = (None,)


@pytest.mark.parametrize(("pooling", "number"), [("mean", 1), ("first", 2), ("last", 3)])
def test_pooling_comes_back_and_goes_on_to_sentence_transformers(tmp_path, pooling, number):
  file = tmp_path / "x.gguf"
  write_gguf(file, *gguf_models.checkpoint("qwen3"), None, vectors=TextVectors((pooling,), UNIT))
  said = gguf.GGUFReader(file).fields[gguf.Keys.LLM.POOLING_TYPE.format(arch="qwen3")].contents()
  assert said == number == gguf.PoolingType[{"first": "CLS"}.get(pooling, pooling.upper())]
  model = open_model(file)
  write_model(model, tmp_path / "hf", format="hf")
  for found in (model.vectors, read_text_vectors(tmp_path / "hf")):
    assert (found.pooling, found.steps) == ((pooling,), UNIT)
  write_model(open_model(tmp_path / "hf"), tmp_path / "again.gguf", format="gguf")
  assert read_gguf(tmp_path / "again.gguf").vectors.pooling == (pooling,)


def test_without_files_of_its_own_an_encoder_s_vector_is_the_mean(tmp_path):
  for name, pooling in (("bert", ("mean",)), ("llama", None), ("t5", None)):
    write_gguf(tmp_path / "x.gguf", *gguf_models.checkpoint(name), None)
    found = read_gguf(tmp_path / "x.gguf").vectors
    assert (found and found.pooling) == pooling


def test_vectors_that_llama_cpp_cannot_make(tmp_path, caplog):
  hf, tensors = gguf_models.checkpoint("bert-bare")
  for vectors, words in (
    (TextVectors(("max",), UNIT), "no pooling max"),
    (TextVectors(("mean", "first"), UNIT), "no pooling mean and first"),
    (TextVectors(steps=(Dense(np.ones((2, 64), np.float32), None, "Identity"),)), "Dense layer"),
  ):
    with pytest.raises(ConfigError, match=words):
      write_gguf(tmp_path / "x.gguf", hf, tensors, None, vectors=vectors)
  assert not list(tmp_path.iterdir())
  caplog.clear()
  write_gguf(tmp_path / "x.gguf", hf, tensors, None, vectors=TextVectors(prompts={"query": "Q: "}, lower=True))
  said = " ".join(record.getMessage() for record in caplog.records)
  assert "length 1" in said and "prompts of texts (query)" in said and "small letters" in said


def test_a_pooling_that_is_not_known(tmp_path):
  write_gguf(tmp_path / "x.gguf", *gguf_models.checkpoint("bert"), None)
  file = read_gguf(tmp_path / "x.gguf")
  with pytest.raises(CheckpointError, match="bert.pooling_type is 5; those known are 1, 2, 3"):
    _ = dataclasses.replace(file, metadata=file.metadata | {"bert.pooling_type": 5}).vectors
