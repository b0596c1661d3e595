"""Ways of fine-tuning through the loop: killed and resumed, read again, begun from an adapter, with new tokens."""

import json
import shutil

import numpy as np
import pytest

from jaxllm.base.errors import CheckpointError, ConfigError, DataError
from jaxllm.config import load_config
from jaxllm.data.tokenizers import load_tokenizer
from jaxllm.inference.load import load_model
from jaxllm.interop.open import open_model
from jaxllm.interop.safetensors import write_safetensors
from jaxllm.interop.tensors import in_memory
from jaxllm.prepare import prepare_and_report
from jaxllm.training.loop import train
from jaxllm.training.start import with_tokenizer

TOKENS = np.arange(16, dtype=np.int32)[None] + 20
LORA = {"peft.kind": "lora", "peft.rank": 2, "optimizer.learning_rate": 0.01, "optimizer.schedule": "constant"}
QLORA = {"model_init.quantize": "nf4", "model_init.group_size": 16, "model_init.double_quantize": True}


def run(job, directory, **keys):
  return train(load_config(str(job), list({**keys}.items())), directory)


def values(directory, name):
  lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="module")
def base(job, tmp_path_factory):
  """A Hugging Face directory."""
  directory = tmp_path_factory.mktemp("base")
  run(job, directory / "run", **{"model.tie_embeddings": False})
  load_model(directory / "run").save(directory / "hf", format="hf")
  return directory / "hf"


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
  """An adapter in PEFT's form of two modules, of another rank in one layer of one of them."""
  directory, rng, tensors = tmp_path_factory.mktemp("adapter") / "made", np.random.default_rng(0), {}
  directory.mkdir()
  for layer, name, rank in ((0, "q_proj", 3), (1, "q_proj", 2), (0, "v_proj", 3), (1, "v_proj", 3)):
    module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
    tensors[f"{module}.lora_A.weight"] = rng.normal(size=(rank, 32)).astype(np.float32)
    tensors[f"{module}.lora_B.weight"] = 0.1 * rng.normal(size=(32, rank)).astype(np.float32)
  write_safetensors(directory / "adapter_model.safetensors", in_memory(tensors))
  settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
  settings |= {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "base_model_name_or_path": str(base)}
  (directory / "adapter_config.json").write_text(json.dumps(settings))
  return directory


WAYS = {
  "pissa": {"peft.init": "pissa"},
  "dora": {"peft.kind": "dora", **QLORA},
  "saved": {"peft.modules_to_save": ("head", "mlp/gate"), "peft.rank_pattern": {"up": 3}, "peft.rslora": True, **QLORA},
  "path": {"peft.rank": 8},
}


@pytest.mark.parametrize("way", WAYS)
def test_runs_resume_bit_for_bit_and_are_read_again(way, job, base, adapter, tmp_path):
  more = LORA | {"model_init.path": str(base)} | WAYS[way]
  more |= {"peft.path": str(adapter)} if way == "path" else {}
  run(job, tmp_path / "whole", **more)
  for steps in (2, 6):
    run(job, tmp_path / "parts", **more, **{"training.steps": steps})
  assert values(tmp_path / "parts", "loss") == values(tmp_path / "whole", "loss")
  loss = values(tmp_path / "whole", "loss")
  assert len(loss) == 6
  # Read as one model it has the loss that the run had at its end, by other code
  same = {"model_init.path": str(tmp_path / "whole"), "optimizer.learning_rate": 0.0, "training.steps": 1}
  run(job, tmp_path / "again", **same)
  assert values(tmp_path / "again", "eval/loss")[1] == pytest.approx(
    values(tmp_path / "whole", "eval/loss")[6], abs=2e-5
  )
  record = json.loads((tmp_path / "whole" / "start.json").read_text())
  assert (record["peft"] is not None) == (way == "path")
  if way == "pissa":  # computed once
    assert (tmp_path / "parts" / "start_adapter" / "0").is_dir()


def test_an_adapter_begins_as_it_is_and_must_stay_there(job, base, adapter, tmp_path):
  there = shutil.copytree(adapter, tmp_path / "adapter")
  more = LORA | {"model_init.path": str(base), "peft.path": str(there), "peft.rank": 8, "optimizer.learning_rate": 0.0}
  run(job, tmp_path / "run", **more)
  wanted = load_model(base, adapter=adapter)(TOKENS)
  np.testing.assert_allclose(load_model(tmp_path / "run")(TOKENS), wanted, atol=1e-5)
  settings = json.loads((tmp_path / "run" / "config.json").read_text())["peft"]
  assert settings["rank"] == 3 and settings["targets"] == ["blocks/attention/query", "blocks/attention/value"]
  config = json.loads((there / "adapter_config.json").read_text())
  (there / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
  with pytest.raises((CheckpointError, ConfigError), match="was") as error:
    run(job, tmp_path / "run", **more, **{"training.steps": 8})
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "keys, message",
  [
    ({"peft.rank": 5}, "peft.rank is 5, but that of the adapter at peft.path .* is 3; leave it to the adapter"),
    ({"peft.kind": "dora"}, "peft.kind is 'dora', but the adapter at peft.path .* is 'lora'"),
    ({"peft.path": "nowhere"}, "nowhere is no adapter"),
    ({"model_init.path": ""}, "peft.path is set, but model_init.path is not"),
    ({"peft.rank": 40, "peft.path": ""}, "peft.rank 40 is over the smaller dimension of blocks/attention/key"),
    ({"peft.modules_to_save": ("hed",), "peft.path": ""}, "peft.modules_to_save: 'hed' matches no module"),
    (
      {"model_init.quantize": "nf4", "model_init.group_size": 48, "model_init.double_quantize": True},
      r"blocks/\S+: groups of 48 do not divide the 32 inputs",
    ),
    ({"model_init.adapter": "nowhere", "peft.path": ""}, "nowhere is no adapter"),
    ({"model_init.double_quantize": True}, "model_init.double_quantize is set, but model_init.quantize is not"),
    ({"training.neftune_alpha": -1}, "training.neftune_alpha is -1"),
    ({"model_init.new_tokens": ("<a>", "<a>")}, "the token '<a>' cannot be new: it is there already"),
    ({"model_init.new_tokens": ("<new>",)}, "was prepared with another data.tokenizer"),
  ],
)
def test_mistakes_are_one_line(keys, message, job, base, adapter, tmp_path):
  more = LORA | {"model_init.path": str(base), "peft.rank": 8, "peft.path": str(adapter)} | keys
  with pytest.raises((ConfigError, CheckpointError, DataError), match=message) as error:
    run(job, tmp_path / "run", **more)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_factors_of_an_embedding_cannot_learn_new_tokens(job, base, tmp_path):
  factors = {"lora_embedding_A": np.zeros((2, 320), np.float32), "lora_embedding_B": np.ones((32, 2), np.float32)}
  tensors = {f"base_model.model.model.embed_tokens.{name}": x for name, x in factors.items()}
  write_safetensors(tmp_path / "adapter_model.safetensors", in_memory(tensors))
  settings = {"peft_type": "LORA", "r": 2, "target_modules": ["embed_tokens"]}
  (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
  more = {"model_init.path": str(base), "peft.path": str(tmp_path), "model_init.new_tokens": ("<a>",)}
  with pytest.raises(ConfigError, match="has factors of embedding/tokens, which cannot learn new tokens"):
    run(job, tmp_path / "run", **LORA | more | {"peft.rank": 8, "data.dir": str(tmp_path / "data")})


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_new_tokens(kind, job, base, tmp_path, capsys):
  """Tokenizer, embedding and head grow together; the new rows begin as the mean and are trained."""
  more = {
    "model_init.path": str(base),
    "model_init.new_tokens": ("<note>", "<end>"),
    "data.dir": str(tmp_path / "data"),
  }
  more |= LORA if kind == "lora" else {}
  config = with_tokenizer(load_config(str(job), list(more.items())))
  prepare_and_report(config.data)
  old, new = load_tokenizer(base), load_tokenizer(config.data.tokenizer.path)
  assert new.vocab_size == old.vocab_size + 2
  for text in ("a <note>b<end>", "<note><note>"):
    for encode in (new.encode, new.encode_chat):
      assert [i for i in encode(text) if i >= old.vocab_size] == [
        old.vocab_size + n for n in ([0, 1] if "end" in text else [0, 0])
      ]
    assert new.decode(new.encode(text)) == text
  run(job, tmp_path / "still", **more | {"optimizer.learning_rate": 0.0, "training.steps": 1})
  before, still = open_model(base).tensors["embedding/tokens"].read(), open_model(tmp_path / "still")
  rows, first = still.tensors["embedding/tokens"].read(), old.vocab_size
  assert len(rows) == max(first + 2, len(before))
  np.testing.assert_allclose(rows[:first], before[:first])
  np.testing.assert_allclose(rows[first:], np.broadcast_to(before[:first].mean(0), rows[first:].shape), atol=1e-6)
  run(job, tmp_path / "run", **more)
  tuned = open_model(tmp_path / "run")
  assert np.abs(tuned.tensors["head/weight"].read() - still.tensors["head/weight"].read()).max() > 1e-4
  if kind == "lora":
    assert "trained whole" in capsys.readouterr().out
  load_model(tmp_path / "run").save(tmp_path / "hf", format="hf")
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  assert theirs.convert_tokens_to_ids(["<note>", "<end>"]) == [first, first + 1]


def test_an_adapter_that_one_host_does_not_see(base, adapter, two_processes):
  code = """
  import sys
  from jaxllm.base.errors import UserError
  from jaxllm.training.start import _open, _open_adapter
  policy = _open(sys.argv[1])
  try:
    _open_adapter(policy, sys.argv[2] if index == 0 else "nowhere")
  except UserError as error:
    print("error:", error)
  assert _open_adapter(policy, sys.argv[2])[1].kind == "lora"
  """
  one, other = two_processes(code, base, adapter, timeout=60)
  assert "error: process 1 failed: nowhere is no adapter" in one and "error: nowhere is no adapter" in other
