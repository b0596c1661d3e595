"""A key that config.json lacks has the value that its class in transformers gives it."""

import pytest

transformers = pytest.importorskip("transformers")

from test_decoder_families import NEWER, OLDER  # noqa: E402
from test_encoder_families import ENCODER_DECODERS, ENCODERS  # noqa: E402

from jaxllm.base.errors import ConfigError  # noqa: E402
from jaxllm.interop.families import FAMILIES  # noqa: E402
from jaxllm.interop.huggingface import config_from_huggingface  # noqa: E402

CASES = {name: (f"{stem}Config", settings) for name, (stem, settings) in (NEWER | OLDER).items()}
CASES |= {
  name: (getattr(transformers, cls).config_class.__name__, settings | {"architectures": [cls]})
  for name, (cls, settings) in (ENCODER_DECODERS | ENCODERS).items()
}
# What says which model it is, and what ours has no word for.
SAID = {"model_type", "architectures"}


def read(hf):
  """The ModelConfig, or None where there is none."""
  try:
    return config_from_huggingface(hf)
  except (ConfigError, TypeError):
    return None


@pytest.mark.parametrize("name", CASES)
def test_each_key(name):
  cls, settings = CASES[name]
  cls = getattr(transformers, cls)
  saved = cls(**settings).to_diff_dict() | {key: settings[key] for key in settings}
  differences = {}
  for key in saved.keys() - SAID:
    given = {k: value for k, value in saved.items() if k != key}
    try:
      completed = cls.from_dict(given).to_dict()
      if "tie_word_embeddings" in given:  # T5's class forgets it
        completed["tie_word_embeddings"] = given["tie_word_embeddings"]
    except Exception:  # transformers does not take it either
      continue
    want, got = read(completed), read(given)
    if want != got:
      differences[key] = (got, want)
  assert not differences


@pytest.mark.parametrize("name", FAMILIES)
def test_all_keys(name):
  cls = transformers.CONFIG_MAPPING[name]
  assert read({"model_type": name}) == read(cls().to_dict())
