"""What cannot be trained on is one clear line and exit code 2, through the doors that a user takes."""

import json
import re
from pathlib import Path

import pytest

from jaxllm.data.manifest import read_manifest

CHAT = [
  {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"a{n}"}]} for n in range(9)
]
PAIRS = [{"prompt": f"{n}?", "chosen": f"y{n}", "rejected": f"z{n}"} for n in range(9)]
LONG = [{"prompt": "q" * 80, "chosen": "aaa", "rejected": "b"} for _ in range(9)]
DPO = ("data.task=preference", "data.packing=none", "objective.name=dpo")


def turns(*roles, **last):
  messages = [{"role": role, "content": f"c{n}"} for n, role in enumerate(roles)]
  return {"messages": [*messages[:-1], messages[-1] | last]}


# label -> (lines, flags, message)
ROWS = {
  "nothing": ([], (), "data source 'qa' is empty"),
  "blank lines": (["", " "], (), "data source 'qa' is empty"),
  "a masked row": ([*CHAT, turns("user", "assistant", weight=0)], (), r"qa.jsonl:10: no token is trained"),
  "all rows masked": (
    [turns("user", "assistant", weight=0)] * 3,
    ("data.on_bad_row=skip",),
    r"all 3 examples of data source 'qa' are bad: \S*qa.jsonl:\d: no token is trained",
  ),
  "roles out of order": ([turns("user", "user", "assistant")], (), r"qa.jsonl:1: roles are out of order: message 2"),
  "an assistant first": (
    [turns("assistant", "user", "assistant")],
    (),
    r"message 1 is assistant's, where the beginning",
  ),
  "no reply": ([turns("user")], (), r"qa.jsonl:1: the last message is user's"),
  "unknown columns": ([{"a": 1, "b": 2}], (), r"qa.jsonl:1: no format has the columns a, b; one of messages"),
  "preferences as chat": (PAIRS, (), r"qa.jsonl:1: columns 'chosen' and 'rejected' are preferences: set data.task"),
  "chat as preferences": (CHAT, DPO, r"qa.jsonl:1: no column 'chosen'; it has: messages"),
  "a broken line": ([*CHAT, '{"messages": [}'], (), r"qa.jsonl:10: not a JSON object: Expecting value"),
  "no object": ([*CHAT, "[1, 2]"], (), r"qa.jsonl:10: a JSON object is needed, this is list"),
  "another format named": (CHAT, ("data.sources.0.format=alpaca",), r"qa.jsonl:1: no column 'instruction'"),
  "an unknown format": (CHAT, ("data.sources.0.format=llama",), r"format is 'llama'; choose one of 'auto', 'alpaca'"),
  "a list that is none": (CHAT, ("data.sources.0.kind=json",), r"qa.jsonl:1: not a JSON list of objects"),
  "no Parquet": (CHAT, ("data.sources.0.kind=parquet",), r"qa.jsonl: not a readable Parquet file"),
  "equal sides": ([*PAIRS, PAIRS[0] | {"rejected": "y0"}], DPO, r"qa.jsonl:10: chosen and rejected are the same"),
  "an empty side": ([PAIRS[0] | {"rejected": ""}], DPO, r"qa.jsonl:1: chosen or rejected has no text"),
  "pairs that are too long": (
    LONG,
    DPO,
    r"each of \d examples is over training.seq_len 64, and data.truncation 'drop'",
  ),
  "pairs cut to halves": (LONG, (*DPO, "data.truncation=right"), r"'right' leaves nothing to learn of it"),
}


@pytest.fixture
def plain(chat_job, tmp_path):
  """The config file without a format of its source."""
  config = Path(chat_job.removeprefix("--config="))
  config.write_text(config.read_text().replace(', format="alpaca", columns=columns', ""))
  return chat_job


def fails(door, job, flags, message):
  """The first of the doors that fails does so with one line."""
  flags = [f"--config.{flag}" for flag in flags]
  code, _, err = door("prepare", job, *flags)
  if code == 0:
    code, _, err = door("train", job, *flags, f"--workdir={Path(job.removeprefix('--config=')).parent / 'run'}")
  assert code == 2 and len(err.strip().splitlines()) == 1, err
  assert err.startswith("error: ") and re.search(message, err), err


HELD, TRAINED = 0, 1  # of CHAT, by the hashes of their questions


@pytest.mark.parametrize("good", [HELD, TRAINED])
def test_a_split_without_a_good_row(plain, door, tmp_path, good):
  """The only good row is held out, so that there is nothing to train on; or none is, which is said."""
  bad = [
    [{"role": "user", "content": f"bad {n}"}, {"role": "assistant", "content": "c", "weight": 0}] for n in range(10)
  ]
  rows = [CHAT[good], *({"messages": messages} for messages in bad)]
  (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
  flags = ["--config.data.on_bad_row=skip", "--config.data.heldout_fraction=0.3"]
  _, out, err = door("prepare", plain, *flags)
  code, out, err = door("train", plain, *flags, f"--workdir={tmp_path / 'run'}")
  prepared = read_manifest(tmp_path / "data")
  assert (prepared is None or not prepared.total("train", "tokens")) == (good == HELD)
  if good == HELD:
    assert code == 2 and "no row of data source 'qa' is left to train on" in err and len(err.splitlines()) == 1
  else:
    assert code == 0 and "eval" not in out, err


@pytest.mark.parametrize("label", ROWS)
def test_rows(plain, door, tmp_path, label):
  rows, flags, message = ROWS[label]
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  (tmp_path / "qa.jsonl").write_text("".join(line + "\n" for line in lines))
  fails(door, plain, flags, message)


def test_bad_rows_can_be_skipped(plain, door, tmp_path):
  rows = [*map(json.dumps, CHAT), "{", json.dumps(turns("user", "assistant", weight=0))]
  (tmp_path / "qa.jsonl").write_text("\n".join(rows))
  code, out, err = door("prepare", plain, "--config.data.on_bad_row=skip")
  assert code == 0 and "2 bad rows of qa skipped, see" in out, err
  assert "skipped: " in out and "qa.jsonl:10: not a JSON object" in out and "qa.jsonl:11: no token is trained" in out


REPLY = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
  "": "the tokenizer has no chat template: set data.chat.template",
  "{% for m in messages %}": "the chat template is broken in its line 1",
  "{% for m in messages %}{% if loop.last or m.role == 'user' %}" + REPLY + "{% endif %}{% endfor %}" + PROMPT: (
    "not prefix-stable: it writes the turns up to message 2 otherwise when others follow .*{% generation %}"
  ),
  "{% for m in messages %}{{ m.role + '\n' + m.content + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}": "a stop token is never trained",
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | upper + '<|im_end|>\n' }}{% endfor %}"
  + PROMPT: ("the chat template changes turns: it leaves out parts of message 1"),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates(plain, door, tmp_path, template):
  (tmp_path / "qa.jsonl").write_text(json.dumps(turns("user", "assistant", "user", "assistant")) + "\n")
  if template:
    (tmp_path / "t.jinja").write_text(template)
    fails(door, plain, [f"data.chat.template={tmp_path}/t.jinja"], r"qa.jsonl:1: .*" + TEMPLATES[template])
  else:
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    facts = json.loads(settings.read_text())
    del facts["chat_template"]
    settings.write_text(json.dumps(facts))
    fails(door, plain, [], r"qa.jsonl:1: " + TEMPLATES[template])


@pytest.mark.parametrize("begins, message", [("", "BOS is missing"), ("<s><s>", "BOS is doubled")])
def test_bos(plain, door, tmp_path, begins, message):
  """The tokenizer begins texts with BOS, as Llama's does."""
  import tokenizers

  from jaxllm.data.tokenizers import HuggingFaceTokenizer, byte_alphabet

  rust = tokenizers.Tokenizer(tokenizers.models.BPE(byte_alphabet(), []))
  rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  rust.decoder = tokenizers.decoders.ByteLevel()
  rust.add_special_tokens(["</s>", "<|im_start|>", "<|im_end|>", "<s>"])
  rust.post_processor = tokenizers.processors.TemplateProcessing(
    "<s> $A", special_tokens=[("<s>", rust.token_to_id("<s>"))]
  )
  template = begins + "{% for m in messages %}" + REPLY + "{% endfor %}" + PROMPT
  settings = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": template}
  HuggingFaceTokenizer(rust.to_str(), settings).save(tmp_path / "tokenizer")
  (tmp_path / "qa.jsonl").write_text(json.dumps(turns("user", "assistant")) + "\n")
  fails(door, plain, [], r"qa.jsonl:1: " + message)


def test_parquet_without_columns(plain, door, tmp_path):
  import pyarrow
  import pyarrow.parquet

  pyarrow.parquet.write_table(pyarrow.table({"x": [1, 2]}), tmp_path / "x.parquet")
  source = ["data.sources.0.kind=parquet", f"data.sources.0.path={tmp_path}/x.parquet"]
  fails(door, plain, source, r"x.parquet row 0: no format has the columns x; one of messages")
  fails(door, plain, [*source, "data.task=text"], r"x.parquet: no field 'text'; set the source's `field` to one of: x")


def test_a_reference_of_another_vocabulary(plain, door, tmp_path):
  """Cached or not: its tokens differ, or it has no tokenizer and fewer or more of them."""
  from jaxllm.inference.load import load_model

  (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
  text = tmp_path / "text.jsonl"
  text.write_text("\n".join(json.dumps({"text": "some words here " * 20 + str(n)}) for n in range(40)))
  other = [f"data.dir={tmp_path}/words", "data.task=text", "data.packing=split", "data.sources.0.kind=jsonl"]
  other += [
    f"data.sources.0.path={text}",
    "data.tokenizer.path=",
    "data.tokenizer.vocab_size=290",
    "model.vocab_size=300",
  ]
  flags = [f"--config.{flag}" for flag in [*other, "training.steps=1"]]
  assert door("prepare", plain, *flags)[0] == 0
  assert door("train", plain, f"--workdir={tmp_path}/words_run", *flags)[0] == 0
  for cached in ((), ("objective.cache_reference=True",)):
    reference = f"objective.reference={tmp_path}/words_run"
    fails(door, plain, [*DPO, reference, *cached], r"objective.reference \S+ has another tokenizer than the data")
  model = load_model(tmp_path / "words_run")
  model.tokenizer = None
  model.save(tmp_path / "bare")
  fails(
    door,
    plain,
    [*DPO, f"objective.reference={tmp_path}/bare"],
    r"has a vocabulary of 300, the data's tokenizer has 259",
  )
