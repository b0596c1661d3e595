"""Models saved, loaded and refused; the light package import."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

import jaxllm
from jaxllm.base.errors import CheckpointError, ConfigError, DataError
from jaxllm.inference.load import load_model
from jaxllm.inference.model import Model
from jaxllm.inference.params import SamplingParams
from jaxllm.models.build import declare, init_params
from jaxllm.models.config import ModelConfig, RopeScaling
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.storage.checkpoints import Checkpoints
from jaxllm.storage.config import CheckpointConfig

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp("models") / "tiny"
  tiny.save(directory)
  return directory


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "copy")


def test_a_saved_model_is_the_same_model(saved):
  first, second = tiny.loose_model(), jaxllm.load_model(saved)
  assert second.config == first.config
  jax.tree.map(np.testing.assert_array_equal, second.params, first.params)
  tokens = np.arange(20).reshape(2, 10)
  np.testing.assert_array_equal(first(tokens), second(tokens))
  assert second(tokens).shape == (2, 10, first.config.vocab_size) and second(tokens).dtype == np.float32
  assert first.generate("abc", GREEDY) == second.generate("abc", GREEDY)


def test_logits_are_the_transformers(saved):
  model = load_model(saved)
  graph, _, _ = declare(model.config)
  tokens = np.arange(12).reshape(1, 12)
  want = jax.jit(lambda p, t: nnx.merge(graph, p)(t)[0])(model.params, tokens)
  np.testing.assert_allclose(model(tokens), want, atol=1e-5)


def test_padding_is_where_segment_ids_are_zero():
  """A classifier of the last token's state reads that of the text, and padding changes nothing."""
  more = dict(head="sequence", num_labels=3, pooling="last", tie_embeddings=False)
  config = ModelConfig(vocab_size=50, embed_dim=32, num_layers=2, num_heads=2, max_seq_len=16, **more)
  model = Model(config, init_params(config, jax.random.key(0)))
  tokens = np.arange(1, 13).reshape(2, 6)
  segments = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
  padded = model(tokens, segment_ids=segments)
  np.testing.assert_allclose(padded[1], model(tokens[1:, :3])[0], atol=1e-5)
  np.testing.assert_allclose(padded[0], model(tokens)[0], atol=1e-5)
  assert np.abs(padded[1] - model(tokens)[1]).max() > 1e-3
  with pytest.raises(ConfigError, match=r"segment_ids is of shape \(2, 5\)"):
    model(tokens, segment_ids=segments[:, :5])


def test_a_config_with_everything_in_it_survives(tmp_path):
  config = ModelConfig(
    vocab_size=11,
    embed_dim=8,
    num_layers=2,
    num_heads=2,
    sliding_window=4,
    layer_pattern=("local", "global"),
    rope_scaling=RopeScaling("yarn", 2.0, 32),
    max_seq_len=16,
  )
  Model(config, init_params(config, jax.random.key(0))).save(tmp_path / "m")
  model = load_model(tmp_path / "m")
  assert model.config == config and model.tokenizer is None
  assert len(model.generate([[1, 2]], max_tokens=1)[0].token_ids) == 1
  with pytest.raises(ConfigError, match="no tokenizer"):
    model.generate("text")


def test_text_begins_with_the_start_token_and_ends_before_the_end_token(saved):
  model = load_model(saved)
  assert model.prompt_ids("ab") == [model.tokenizer.bos_id, *b"ab"]
  assert model.prompt_ids("") == [model.tokenizer.bos_id]
  free = model.generate("abc", GREEDY)[0]
  end = free.token_ids[3]
  model.generation["eos_token_id"] = [end]
  done = model.generate("abc", temperature=0, max_tokens=8)[0]
  cut = free.token_ids.index(end)
  assert (done.finish_reason, done.token_ids) == ("stop", free.token_ids[: cut + 1])
  assert done.text == model.tokenizer.decode(free.token_ids[:cut])


def test_the_models_own_sampling_settings(copy):
  (copy / "jaxllm_manifest.json").unlink()  # the file is changed on purpose
  settings = {"temperature": 0, "top_k": 7, "max_new_tokens": 3, "do_sample": True}
  (copy / "generation_config.json").write_text(json.dumps(settings))
  model = load_model(copy)
  assert model.sampling() == SamplingParams(temperature=0, top_k=7, max_tokens=3)
  assert model.sampling(max_tokens=5, top_k=0) == SamplingParams(temperature=0, max_tokens=5)
  assert len(model.generate("x", ignore_eos=True)[0].token_ids) == 3
  with pytest.raises(ConfigError, match="no sampling setting 'max_new_tokens'"):
    model.generate("x", max_new_tokens=3)
  with pytest.raises(ConfigError, match="not both"):
    model.generate("x", GREEDY, seed=1)


def test_stream_joins_to_the_completion(saved):
  model = load_model(saved)
  deltas = list(model.stream("abc", GREEDY))
  assert len(deltas) == 8
  assert "".join(d.text for d in deltas) == deltas[-1].completion.text == model.generate("abc", GREEDY)[0].text


def test_other_dtypes(saved):
  model = load_model(saved, dtype="bfloat16")
  assert {w.dtype.name for w in jax.tree.leaves(model.params)} == {"bfloat16"}
  tokens = np.arange(10)[None]
  exact = load_model(saved)(tokens)
  assert 1e-6 < np.abs(model(tokens) - exact).mean() < 0.05 * np.abs(exact).mean()
  with pytest.raises(ConfigError, match="int3.*choose one of float32"):
    load_model(saved, dtype="int3")


def test_a_mesh_gives_the_same_text(saved):
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
  model = load_model(saved, mesh=mesh)
  assert len(model.params["blocks"]["mlp"]["up"]["weight"].sharding.device_set) == 4
  assert model.generate("abc", GREEDY) == load_model(saved).generate("abc", GREEDY)


def test_a_training_runs_directory(saved, tmp_path):
  model = load_model(saved)
  config = json.loads((saved / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps({**config, "training": {"steps": 5}}))
  model.tokenizer.save(tmp_path / "tokenizer")
  early = jax.tree.map(np.zeros_like, model.params)
  with Checkpoints(tmp_path / "checkpoints", CheckpointConfig()) as checkpoints:
    checkpoints.save(3, {"params": early, "step": np.int32(3)})
    checkpoints.save(5, {"params": model.params, "step": np.int32(5)})
  assert load_model(tmp_path).generate("abc", GREEDY) == model.generate("abc", GREEDY)
  assert not load_model(tmp_path, step=3)(np.ones((1, 4), int)).any()
  assert load_model(tmp_path, dtype="bfloat16").params["final_norm"]["scale"].dtype == "bfloat16"
  with pytest.raises(CheckpointError, match="no checkpoint step 4.*there are .3, 5."):
    load_model(tmp_path, step=4)


def flip_bits(path):
  file = max((p for p in (path / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 255
  file.write_bytes(data)


def change_model(**fields):
  def change(path):
    config = json.loads((path / "config.json").read_text())
    config["model"].update(fields)
    (path / "config.json").write_text(json.dumps(config))

  return change


@pytest.mark.parametrize(
  "damage, error, message",
  [
    (lambda p: (p / "config.json").unlink(), CheckpointError, "is not a model"),
    (lambda p: (p / "config.json").write_text("{}"), CheckpointError, "not a jaxllm model"),
    (lambda p: (p / "config.json").write_text("{"), CheckpointError, "cannot read .*config.json"),
    (change_model(mlp_dim=96), CheckpointError, "blocks/mlp/down/weight has shape"),
    (change_model(attention_bias=True), CheckpointError, "blocks/attention/key/bias has shape None"),
    (change_model(depth=3), CheckpointError, "config.json: unknown config key model.depth"),
    (change_model(embed_dim="wide"), CheckpointError, "model.embed_dim is 'wide'; it should be a whole number"),
    (change_model(num_kv_heads=3), CheckpointError, "config.json: model.num_heads 2 is not divisible"),
    (
      lambda p: (p / "generation_config.json").write_text('{"eos_token_id": "x"}'),
      ConfigError,
      "eos_token_id",
    ),
  ],
)
def test_a_broken_model_is_refused_in_one_line(copy, damage, error, message):
  damage(copy)
  (copy / "jaxllm_manifest.json").unlink()  # which would say it first
  with pytest.raises(error, match=message) as raised:
    load_model(copy)
  assert "\n" not in str(raised.value)


def test_what_is_no_model_is_refused(saved, tmp_path):
  with pytest.raises(CheckpointError, match="no model at .*nothing: there is no such file or folder"):
    load_model(tmp_path / "nothing")
  with pytest.raises(CheckpointError, match="is not a model"):
    load_model(tmp_path)
  with pytest.raises(ConfigError, match="has no steps"):
    load_model(saved, step=3)
  config = ModelConfig(vocab_size=100, embed_dim=8, num_layers=1, num_heads=1, max_seq_len=8)
  with pytest.raises(DataError, match="258 tokens but the model only 100"):
    Model(config, init_params(config, jax.random.key(0)), tiny.ByteTokenizer())


def test_a_model_whose_texts_have_no_end_is_written_so(tmp_path):
  """And not as an empty list of ends, at which transformers' `generate` fails."""
  config = ModelConfig(vocab_size=32, embed_dim=16, num_heads=2, num_layers=1, max_seq_len=16)
  Model(config, init_params(config, jax.random.key(0))).save(tmp_path / "hf", format="hf")
  for file in (tmp_path / "hf").glob("*config.json"):
    assert json.loads(file.read_text()).get("eos_token_id") is None


def test_saving_over_a_model_but_nothing_else(copy, tmp_path):
  tiny.loose_model().save(copy)
  load_model(copy)
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "thesis.txt").write_text("do not lose me")
  with pytest.raises(CheckpointError, match="other things in it"):
    tiny.loose_model().save(tmp_path / "other")
  with pytest.raises(CheckpointError, match="it is a file"):
    tiny.loose_model().save(tmp_path / "other" / "thesis.txt")


@pytest.mark.parametrize(
  "tokens, message",
  [
    ([1, 2, 3], r"\[B, T\]"),
    ([[0.5]], "integer tokens"),
    ([[258]], "between 0 and 257"),
    ([[0] * 49], "sequence length is over the model's limit of 48"),
  ],
)
def test_tokens_that_a_model_does_not_take(tokens, message):
  with pytest.raises(ConfigError, match=message):
    tiny.loose_model()(tokens)


def test_importing_the_package_imports_nothing_heavy():
  code = (
    "import sys, jaxllm; assert 'SamplingParams' in dir(jaxllm)\n"
    "print([m for m in ('jax', 'flax', 'torch', 'tensorflow', 'numpy') if m in sys.modules])"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "[]"
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    _ = jaxllm.nothing
