"""Each key of each config class with another value: the model changes as transformers' does, or it is refused, or a
line says that the key goes unread, or it is known to be harmless and transformers' model stays as it is too."""

import dataclasses
import functools
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import oracle  # noqa: E402
import test_decoder_families as decoders  # noqa: E402
import test_encoder_families as encoders  # noqa: E402
from test_absent_keys import CASES, read  # noqa: E402
from test_same_again import outputs  # noqa: E402
from test_spellings import FIRST, completed  # noqa: E402

from jaxllm.interop.huggingface_keys import remarks  # noqa: E402

QUICK = {"qwen2", "gpt2"}
# One more than its longest distance is in the same bucket for texts of this length.
ALIKE = {(name, "max_position_embeddings") for name in ("deberta-mlm", "deberta-xlarge")}
# Fields that change nothing of what a model computes of a text.
WITHOUT_EFFECT = (
  "max_seq_len",
  "init_std",
  "decoder_start_id",
  "num_labels",
  "pooling",
)  # the last: these are language models
# What has tests of its own: RoPE's groups (test_contradictions.py), a head that is tied or not, DeBERTa's names.
ELSEWHERE = {
  "legacy",
  "rope_parameters",
  "tie_word_embeddings",
  "model_type",
  "architectures",
  "transformers_version",
  "dtype",
}
NAMES = {"gelu": "mish", "relu": "gelu", "silu": "gelu", "gelu_new": "relu", "gelu_pytorch_tanh": "silu", "cls": "mean"}
TYPES = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}


def other_values(value):
  """Values that such a key may have as well."""
  if isinstance(value, bool):
    return [not value]
  if isinstance(value, int):
    return [value + 1, max(1, value // 2)]
  if isinstance(value, float):
    return [1.5 * value + 0.01]
  if isinstance(value, str):
    return [NAMES.get(value, "other")]
  if isinstance(value, list) and value:
    return [[TYPES.get(x, x) for x in value[:1]] + value[1:], [x if isinstance(x, str) else 1 - x for x in value]]
  return [3, True, 0.5] if value is None else []


@functools.cache
def base(name):
  """(config.json, transformers model, its outputs, tokens, ModelConfig)."""
  cls, settings = CASES[name]
  cls = getattr(transformers, cls)
  hf = json.loads(json.dumps(completed(cls, cls(**settings).to_diff_dict() | settings)))
  stem = cls.__name__.removesuffix("Config")
  usual = decoders.CLASSES.get(stem, f"{stem}ForCausalLM")
  head = encoders.ENCODERS[name][0] if name in encoders.ENCODERS else encoders.ENCODER_DECODERS.get(name, (usual,))[0]
  hf["architectures"] = [head]
  model = oracle.torch_model(getattr(transformers, head), cls.from_dict(dict(hf)))
  tokens = torch.tensor(np.random.default_rng(1).integers(3, 97, (2, 20)))
  tokens[:, -1] = 2  # the end, which BART's classifier reads
  return hf, model, outputs(model, tokens), tokens, read(hf)


def changes(name, changed):
  """How far transformers' outputs go from those of the base; None: it does not take it."""
  hf, model, want, tokens, _ = base(name)
  try:
    config = type(model.config).from_dict(json.loads(json.dumps(changed)))
    again = oracle.torch_model(type(model), config)
    state = model.state_dict()
    if {key: x.shape for key, x in again.state_dict().items()} != {key: x.shape for key, x in state.items()}:
      return np.inf
    again.load_state_dict(state)
    got = outputs(again, tokens)
  except Exception:
    return None
  return max(np.abs(got[key] - want[key]).max() for key in want.keys() & got.keys())


def without_idle(config, base):
  """The config with fields that change no output as in the base."""
  idle = [field for field in WITHOUT_EFFECT if field != "max_seq_len" or config.position != "learned"]
  config = dataclasses.replace(config, **{field: getattr(base, field) for field in idle})
  moe = config.moe and dataclasses.replace(config.moe, load_balance_weight=0.0)
  scaling = config.rope_scaling
  if scaling and scaling.kind == "dynamic":  # which texts of these lengths do not feel
    scaling = dataclasses.replace(scaling, original_max_seq_len=1)
  return dataclasses.replace(config, moe=moe, rope_scaling=scaling)


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*FIRST.values(), "deberta-xlarge")],
)
def test_each_key_with_another_value(name):
  hf, _, _, _, config = base(name)
  assert not remarks(hf), "what transformers writes is read, or known to be harmless"
  wrong = {}
  for key in hf.keys() - ELSEWHERE:
    for value in other_values(hf[key]):
      changed = hf | {key: value}
      got = read(changed)
      if got is None or any(repr(key) in line for line in remarks(changed)):
        continue
      theirs = changes(name, changed)
      if theirs is None:
        continue
      same = without_idle(got, config) == without_idle(config, config)
      if (name, key) not in ALIKE and (
        theirs > 1e-4 if same else theirs < 1e-6
      ):  # between them is rounding, in another order of sums
        wrong[f"{key} = {value!r}"] = f"transformers' changes by {theirs}, ours {'stays' if same else 'changes'}"
  assert not wrong


def test_keys_that_no_class_knows_are_reported():
  hf = base("llama")[0]
  assert remarks(hf | {"alibi_everywhere": True, "unheard_of": 3}) == [
    "config.json has keys that are not read here: 'alibi_everywhere', 'unheard_of'"
  ]
  assert not remarks(hf | {"unheard_of": None, "nothing": False})
  # of another family: transformers passes over it too, but somebody meant something by it
  assert "'sliding_window'" in remarks(hf | {"sliding_window": 4})[0]
