"""Heads of decoders beside the language model's against transformers' classes with random weights: which family has
which, logits, and the files that are written."""

import json

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import test_decoder_families as decoders  # noqa: E402
from checkpoint_arrays import params_from_huggingface  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from test_encoder_families import forward, spans  # noqa: E402
from transformers.models.auto import modeling_auto as auto  # noqa: E402

from jaxllm.base.errors import ConfigError  # noqa: E402
from jaxllm.inference.load import load_model  # noqa: E402
from jaxllm.interop.families import DECODERS, FAMILIES  # noqa: E402
from jaxllm.interop.huggingface import config_to_huggingface  # noqa: E402
from jaxllm.interop.open import open_model  # noqa: E402
from jaxllm.interop.write import write_model  # noqa: E402
from jaxllm.models.config import ModelConfig  # noqa: E402

T, LENGTHS = 20, (20, 13)
THEIRS = {
  "sequence": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
  "token": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
  "span": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
SETTINGS = {}
for _name, _case in (decoders.OLDER | decoders.NEWER).items():
  SETTINGS.setdefault(_name.split("-")[0], _case)
OPT_350M = decoders.OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=24)
LABELS = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
CASES = {
  f"{family.name}-{head}": (family.name, head)
  for family in DECODERS
  for head in THEIRS
  if head in family.architectures and not family.text_config
}
CASES |= {f"opt-350m-{head}": ("opt", head) for head in ("sequence", "span")}
# One of each way of naming and of each thing that stands between the last norm and the head.
COMPUTED = {"llama-sequence", "gpt2-token", "opt-350m-sequence", "qwen3-span"}
WRITTEN = COMPUTED | {"gemma3_text-sequence", "mixtral-token", "falcon-span", "gpt_neox-sequence"}


def quick(some):
  """All cases, of which some are not slow."""
  return [pytest.param(name, marks=() if name in some else pytest.mark.slow) for name in CASES]


def test_which_family_has_which():
  for family in DECODERS:
    theirs = {head: names[family.name] for head, names in THEIRS.items() if family.name in names}
    assert {head: cls for head, cls in family.architectures.items() if head in THEIRS} == theirs, family.name


def case(name, directory):
  """transformers' model, saved in `directory`, and its batch."""
  family, head = CASES[name]
  stem, settings = SETTINGS[family]
  settings = (OPT_350M if "350m" in name else settings) | {"pad_token_id": 0}
  labels = LABELS | {"problem_type": "single_label_classification"} if head != "span" else {}
  config = getattr(transformers, f"{stem}Config")(**settings, **labels)
  model = oracle.torch_model(getattr(transformers, FAMILIES[family].architectures[head]), config)
  if stem == "Falcon":
    model.config._attn_implementation = "sdpa"  # its eager one adds ALiBi twice
  with torch.no_grad():
    for key, buffer in model.named_buffers():
      if key.endswith("e_score_correction_bias"):
        buffer.copy_(0.3 * torch.randn_like(buffer))
  model.save_pretrained(directory)
  mask = (np.arange(T) < np.array(LENGTHS)[:, None]).astype(np.int32)
  tokens = np.where(mask, np.random.default_rng(1).integers(3, decoders.V, (2, T)), 0)
  return model, {"tokens": tokens, "segment_ids": mask}


def logits(model, batch):
  with torch.no_grad():
    out = model(torch.tensor(batch["tokens"]), attention_mask=torch.tensor(batch["segment_ids"]))
  return spans(out) if "start_logits" in out else out.logits.numpy()


@pytest.mark.parametrize("name", quick(COMPUTED))
def test_logits(name, tmp_path):
  model, batch = case(name, tmp_path)
  ours = open_model(tmp_path)
  want = logits(model, batch)
  _, got = forward(ours.config)(ours.params(), batch)
  assert 0.1 < want.std() < 30  # else the tolerance says nothing
  real = batch["segment_ids"] == 1
  got = np.asarray(got)
  assert got.shape == want.shape
  oracle.assert_close(got if got.ndim == 2 else got[real], want if want.ndim == 2 else want[real])


@pytest.mark.parametrize("name", quick(WRITTEN))
def test_export(name, tmp_path):
  model, batch = case(name, tmp_path / "theirs")
  write_model(open_model(tmp_path / "theirs"), tmp_path / "ours", format="hf")
  read, wrote = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
  assert read.keys() == wrote.keys()
  for key, x in read.items():
    np.testing.assert_array_equal(wrote[key], x, err_msg=key)
  before, after = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("theirs", "ours"))
  for key in ("model_type", "architectures", "id2label", "label2id", "problem_type"):
    assert after.get(key) == before.get(key), key
  how = {"attn_implementation": model.config._attn_implementation, "output_loading_info": True}
  again, info = type(model).from_pretrained(tmp_path / "ours", **how)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  np.testing.assert_array_equal(logits(again, batch), logits(model, batch))


def test_a_span_by_the_prefix_of_the_other_classes(tmp_path):
  """Files of other versions have the model of `LlamaForQuestionAnswering` under the name that all classes have."""
  case("llama-span", tmp_path)
  hf, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
  assert sum(key.startswith("transformer.") for key in tensors) == len(tensors) - 2
  renamed = {key.replace("transformer.", "model."): x for key, x in tensors.items()}
  want, got = (params_from_huggingface(hf, named)[1] for named in (tensors, renamed))
  np.testing.assert_array_equal(got["blocks"]["mlp"]["up"]["weight"], want["blocks"]["mlp"]["up"]["weight"])


def test_a_reward_of_a_text(tmp_path):
  """One label, of texts as they come; without a padding token in config.json, too."""
  stem, settings = SETTINGS["llama"]
  config = getattr(transformers, f"{stem}Config")(**settings | {"pad_token_id": None, "num_labels": 1})
  model = oracle.torch_model(transformers.LlamaForSequenceClassification, config)
  model.save_pretrained(tmp_path)
  ours = load_model(tmp_path)
  assert ours.config.num_labels == 1 and ours.config.pooling == "last"
  tokens = np.random.default_rng(2).integers(3, decoders.V, (1, 7))
  with torch.no_grad():
    want = model(torch.tensor(tokens)).logits.numpy()
  oracle.assert_close(np.asarray(ours(tokens)), want)


def test_a_classifier_of_a_gemma_that_sees(tmp_path):
  """Its config.json has the labels outside of the language model's group."""
  vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
  config = transformers.Gemma3Config(
    text_config=decoders.GEMMA3, vision_config=vision | dict(patch_size=14), mm_tokens_per_image=4, **LABELS
  )
  oracle.torch_model(transformers.Gemma3ForSequenceClassification, config).save_pretrained(tmp_path)
  tensors = load_file(tmp_path / "model.safetensors")
  c, params = params_from_huggingface(json.loads((tmp_path / "config.json").read_text()), tensors)
  assert (c.head, c.num_labels) == ("sequence", 3)
  np.testing.assert_array_equal(params["head"]["weight"].T, tensors["score.weight"])


def test_a_class_that_transformers_has_not():
  c = ModelConfig(num_layers=1, embed_dim=32, num_heads=4, head="sequence", num_labels=2, pooling="last")
  assert config_to_huggingface(c, "llama")["architectures"] == ["LlamaForSequenceClassification"]
  with pytest.raises(ConfigError, match="a granite checkpoint cannot say model.head = 'sequence'"):
    config_to_huggingface(c, "granite")
