"""A key of config.json in another spelling that its class in transformers knows is read as that class reads it, where
the key itself stands beside it too."""

import inspect
import re
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

from test_absent_keys import CASES, read  # noqa: E402

from jaxllm.interop.families import FAMILIES  # noqa: E402
from jaxllm.interop.families.class_defaults import CLASS_DEFAULTS, SPELLINGS  # noqa: E402
from jaxllm.interop.huggingface import family_of, read_config  # noqa: E402
from jaxllm.interop.huggingface_keys import HARMLESS  # noqa: E402

# The first case of each class.
FIRST = {}
for _name, (_cls, _) in CASES.items():
  FIRST.setdefault(_cls, _name)
SPELLED = [name for cls, name in FIRST.items() if getattr(transformers, cls).attribute_map or "Falcon" in cls]


def saved(name):
  """(class, config.json that it writes)."""
  cls, settings = CASES[name]
  cls = getattr(transformers, cls)
  return cls, cls(**settings).to_diff_dict() | settings


def pairs(cls):
  """Other spelling -> key, of a config class and of its older code."""
  return cls.attribute_map | ({"n_embed": "hidden_size"} if cls.__name__ in ("BloomConfig", "FalconConfig") else {})


def completed(cls, given):
  """The same config.json with every key, as transformers understands it."""
  full = cls.from_dict(dict(given)).to_dict()
  return full | {key: given[key] for key in ("tie_word_embeddings",) if key in given}  # T5's class forgets it


@pytest.mark.parametrize("name", SPELLED)
def test_other_spellings(name):
  cls, hf = saved(name)
  checked = 0
  for one, other in pairs(cls).items():
    for key, spelling in ((one, other), (other, one)):
      if not isinstance(hf.get(key), int):
        continue
      alone = {k: value for k, value in hf.items() if k != key} | {spelling: hf[key]}
      both = hf | {spelling: 2 * hf[key]}
      null = hf | {spelling: None}
      for given in (alone, both):
        assert read(given) == read(completed(cls, given)), (key, spelling)
      assert read(alone) is not None
      assert read(null) == read(hf), "a null says nothing"
      checked += 1
  assert checked >= len(SPELLINGS[family_of(hf).name]) - 2


def test_the_other_spellings_of_a_key_that_is_large():
  """BLOOM-560m's own file: the width and the heads by other names than its class has today."""
  c = read({"model_type": "bloom", "n_embed": 64, "num_attention_heads": 4, "n_layer": 2, "vocab_size": 11})
  assert (c.embed_dim, c.num_heads, c.head_dim) == (64, 4, 16)


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_that_only_the_code_of_a_class_reads(name):
  """Those that `__post_init__` takes from what is no field: each is read here too, or has no bearing on the model."""
  cls = transformers.CONFIG_MAPPING[name]
  cls = cls.sub_configs.get("text_config", cls)
  code = Path(inspect.getfile(cls)).read_text()
  found = set(re.findall(r'kwargs\.(?:pop|get|setdefault)\("(\w+)"', code))
  family = FAMILIES[name]
  needed = {"num_experts_per_tok": 2, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
  needed |= {
    "position_buckets": 6,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
  }  # what the classes have no default for, or one that
  known = read_config({"model_type": name} | needed)[1].asked  # no published model has
  known |= SPELLINGS.get(family.name, {}).keys() | CLASS_DEFAULTS[family.name].keys()
  assert found <= known | {key for keys in HARMLESS.values() for key in keys}
