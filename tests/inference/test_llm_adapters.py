"""`LLM` with adapters that PEFT made: each prompt's text and log-probabilities are those of PEFT under its adapter."""

import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

sys.path.append(str(Path(__file__).parents[1] / "interop"))

import peft_models  # noqa: E402

from jaxllm import LLM, SamplingParams  # noqa: E402
from jaxllm.base.errors import CheckpointError, ConfigError  # noqa: E402

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SIZES = dict(max_num_seqs=3, page_size=4, num_pages=10, max_num_batched_tokens=12, compile_at_start=False)
SIZES |= dict(compiler_options={"xla_backend_optimization_level": 0}, row_buckets=(3,), token_buckets=(12,))
QV = ["q_proj", "v_proj"]
SETTINGS = {
  "few": dict(r=4, lora_alpha=6, target_modules=QV),
  "all": dict(r=2, use_rslora=True, target_modules="all-linear", rank_pattern={"up_proj": 3}),
  "table": dict(r=3, target_modules=["embed_tokens", "o_proj"]),
  "dora": dict(r=2, use_dora=True, target_modules=["k_proj", "down_proj"], layers_to_transform=[1]),
}
PROMPTS = [[7], [3, 1, 4, 1, 5], list(range(20, 33))]


def made(folder, family, settings):
  """A base and its adapters by PEFT, saved; the module that has them all."""
  base = peft_models.save(family, folder / "base")
  name = peft_models.MODELS[family][0]
  module = getattr(transformers, name).from_pretrained(base, dtype=torch.float32)
  for number, (name, one) in enumerate(settings.items()):
    config = peft.LoraConfig(**one)
    module = peft.get_peft_model(module, config, name) if number == 0 else module
    if number:
      module.add_adapter(name, config)
  torch.manual_seed(1)
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      if "magnitude" in name:
        parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
      elif "lora_" in name:
        parameter.copy_(0.4 * torch.randn_like(parameter))
  module.save_pretrained(folder / "adapters")
  return base, {name: folder / "adapters" / name for name in settings}, module.eval()


@torch.no_grad()
def after(module, name, ids):
  """Log-probabilities [T, V] after each token, by PEFT."""
  run = lambda: torch.log_softmax(module(input_ids=torch.tensor([ids])).logits[0], -1).numpy()  # noqa: E731
  if name is None:
    with module.disable_adapter():
      return run()
  module.set_adapter(name)
  return run()


def plain_loop(module, name, prompt, count=8):
  ids = list(prompt)
  for _ in range(count):
    ids.append(int(after(module, name, ids)[-1].argmax()))
  return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("family", ["llama", "tied"])
def test_each_prompt_is_peft_s_under_its_adapter(tmp_path, agrees, caplog, family):
  base, adapters, module = made(tmp_path, family, SETTINGS)
  with caplog.at_level(logging.INFO, "jaxllm"):
    llm = LLM(base, adapters=adapters, **SIZES)
  counts = [message for message in caplog.messages if message.startswith("adapter ")]
  assert counts[0] == "adapter 'few': lora of rank 4 on attention/query x 2, attention/value x 2"
  assert "mlp/up x 2" in counts[1] and "rank 2, 3" in counts[1]
  assert "embedding/tokens x 1" in counts[2]
  assert counts[3] == "adapter 'dora': dora of rank 2 on attention/key x 1, mlp/down x 1"
  names = [None, *SETTINGS]
  asked = [(prompt, name) for prompt in PROMPTS for name in names]
  want = [plain_loop(module, name, prompt) for prompt, name in asked]
  assert all(len(set(want[i::5])) > 1 and len(set(want[5 * i :][:5])) > 3 for i in range(3))
  answers = llm.generate([prompt for prompt, _ in asked], GREEDY, adapter=[name for _, name in asked])
  assert [answer.outputs[0].token_ids for answer in answers] == want
  scores = llm.score([PROMPTS[2]] * 5, adapter=names)
  for name, score in zip(names, scores, strict=True):
    found = after(module, name, PROMPTS[2])[np.arange(12), PROMPTS[2][1:]]
    agrees(f"Adapters in one batch, {name or 'none'}, {family}", "log-probabilities", score, found)
  assert llm.stats()["pages_free"] == llm.stats()["pages_total"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  folder = tmp_path_factory.mktemp("two")
  return made(folder, "llama", {name: SETTINGS[name] for name in ("few", "dora")})


def test_a_request_that_is_refused_harms_no_other(two):
  base, adapters, module = two
  llm = LLM(base, adapters=adapters, **SIZES)
  beams = SamplingParams(num_beams=2, temperature=0, max_tokens=2)
  asked = [(GREEDY, "few"), (GREEDY, "other"), (beams, "few"), (GREEDY, "dora")]
  answers = llm.generate([PROMPTS[1]] * 4, [one for one, _ in asked], adapter=[name for _, name in asked])
  for i, name in ((0, "few"), (3, "dora")):
    assert answers[i].outputs[0].token_ids == plain_loop(module, name, PROMPTS[1])
  assert answers[1].error == "there is no adapter 'other'; there are few, dora"
  assert "num_beams: beams are of one model" in answers[2].error
  with pytest.raises(ConfigError, match="1 adapters for 2 texts"):
    llm.generate(PROMPTS[:2], GREEDY, adapter=["few"])
  with pytest.raises(ConfigError, match="there is no adapter 'other'"):
    llm.generate(PROMPTS[:2], GREEDY, adapter="other")


def test_sums_of_adapters_under_one_name_and_over_one_that_is_always_there(two):
  base, adapters, _ = two
  alone = LLM(base, adapter=[(adapters["few"], 0.5), (adapters["few"], 0.25)], **SIZES)
  several = LLM(base, adapters={"x": [(adapters["few"], 0.5), (adapters["few"], 0.25)]}, **SIZES)
  over = LLM(base, adapter=[(adapters["few"], 0.5)], adapters={"x": [(adapters["few"], 0.25)]}, **SIZES)
  want = alone.score(PROMPTS[2])[0]
  np.testing.assert_allclose(several.score(PROMPTS[2], adapter="x")[0], want, atol=1e-5)
  np.testing.assert_allclose(over.score(PROMPTS[2], adapter="x")[0], want, atol=1e-5)
  assert np.abs(over.score(PROMPTS[2])[0] - want).max() > 1e-3


@pytest.mark.slow
def test_devices_and_fewer_bits(two):
  base, adapters, _ = two
  names = [None, "few", "dora"] * 3
  prompts = [prompt for prompt in PROMPTS for _ in range(3)]
  texts = []
  for how in ({}, dict(tensor_parallel_size=2), dict(data_parallel_size=2)):
    answers = LLM(base, adapters=adapters, **how, **SIZES).generate(prompts, GREEDY, adapter=names)
    texts.append([one.outputs[0].token_ids for one in answers])
  assert texts[0] == texts[1] == texts[2]
  small = LLM(base, adapters=adapters, quantization="int8", **SIZES)
  whole = LLM(base, adapters=adapters, **SIZES)
  for name in (None, "few", "dora"):
    difference = np.abs(small.score(PROMPTS[2], adapter=name)[0] - whole.score(PROMPTS[2], adapter=name)[0]).max()
    assert 0 < difference < 0.5


def test_the_same_base_elsewhere(two, tmp_path):
  base, adapters, module = two
  copy = shutil.copytree(base, tmp_path / "another-name")
  llm = LLM(copy, adapters=adapters, **SIZES)
  answer = llm.generate(PROMPTS[1], GREEDY, adapter="few")[0]
  assert answer.outputs[0].token_ids == plain_loop(module, "few", PROMPTS[1])


def test_adapters_of_another_base_are_refused(two, tmp_path):
  base, adapters, _ = two
  other = tmp_path / "other"
  shutil.copytree(base, other)
  tensors = transformers.LlamaForCausalLM.from_pretrained(base)
  torch.manual_seed(9)
  with torch.no_grad():
    for parameter in tensors.parameters():
      parameter.copy_(0.1 * torch.randn_like(parameter))
  tensors.save_pretrained(other)
  with pytest.raises(
    CheckpointError, match="the adapter 'few' in .*few belongs to .*base, which is another model than"
  ):
    LLM(other, adapters={"few": adapters["few"]}, **SIZES)
  _, foreign, _ = made(tmp_path / "gpt2", "gpt2", {"conv": dict(r=2, target_modules=["c_attn"], fan_in_fan_out=True)})
  with pytest.raises(CheckpointError, match="the adapter 'conv': .*does not fit its base model"):
    LLM(base, adapters=adapters | foreign, **SIZES)


def test_what_cannot_be_mixed_is_refused_by_name(tmp_path):
  settings = {"table": SETTINGS["table"], "saved": dict(r=2, target_modules=QV, modules_to_save=["norm"])}
  settings["both"] = dict(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
  base, adapters, module = made(tmp_path, "tied", settings)
  with pytest.raises(ConfigError, match="'saved' replaces .*norm/scale, which cannot differ within a batch"):
    LLM(base, adapters={"saved": adapters["saved"]}, **SIZES)
  LLM(base, adapters={"both": adapters["both"]}, **SIZES)
  mixed = LLM(base, adapters={name: adapters[name] for name in ("table", "both")}, **SIZES)
  for name in ("table", "both"):  # the one changes the embedding alone, the other the head too
    want = after(module, name, PROMPTS[2])[np.arange(12), PROMPTS[2][1:]]
    np.testing.assert_allclose(mixed.score(PROMPTS[2], adapter=name)[0], want, atol=1e-4)
  with pytest.raises(CheckpointError, match="'x': .* is no adapter"):
    LLM(base, adapters={"x": base}, **SIZES)
  file = adapters["table"] / "adapter_config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "IA3"}))
  with pytest.raises(ConfigError, match="the adapter 'table': .*only LORA can be read"):
    LLM(base, adapters={"table": adapters["table"]}, **SIZES)
