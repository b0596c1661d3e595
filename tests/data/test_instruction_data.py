"""Instruction data from files to batches: every kind of file, mixtures, bad rows, truncation, packing, exact resume."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from chat_templates import CHATML

from jaxllm.base.errors import ConfigError, DataError
from jaxllm.data.config import ChatConfig, DataConfig, SourceConfig, TokenizerConfig
from jaxllm.data.examples import packed, unpacked
from jaxllm.data.heldout import heldout_batches
from jaxllm.data.manifest import open_prepared
from jaxllm.data.pipeline import train_batches
from jaxllm.data.prepare import prepare
from jaxllm.data.show import example_rows, first_row, marked_row

T = 96
MANY = [{"instruction": f"Count to {n}", "output": ", ".join(map(str, range(1, n % 7 + 2)))} for n in range(40)]
PAIRS = [{"instruction": f"{n}+1?", "chosen": f"It is {n + 1}.", "rejected": f"It is {n}."} for n in range(20)]


def turns(question, answer, **fields):
  return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **fields}]


@pytest.fixture
def job(chat_tokenizer, tmp_path):
  """job(rows, …): a prepared DataConfig of a JSONL file with these rows."""
  chat_tokenizer(CHATML).save(tmp_path / "tokenizer")
  lines = []

  def make(*files, kind="jsonl", log=lines.append, **settings):
    sources = []
    for number, rows in enumerate(files):
      path = tmp_path / f"{number}.{kind}"
      path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
      sources.append(SourceConfig(kind=kind, path=str(path), name=f"part{number}"))
    defaults = {"task": "chat", "packing": "best_fit", "heldout_fraction": 0.2, "dir": str(tmp_path / "data")}
    tokenizer = TokenizerConfig(path=str(tmp_path / "tokenizer"))
    config = DataConfig(**{"sources": tuple(sources), "tokenizer": tokenizer, **defaults, **settings})
    prepare(config, log=log)
    return config

  make.lines = lines
  return make


def rows_of(config, seq_len=T, **settings):
  """All rows of one epoch, as text, in any order."""
  once = dataclasses.replace(config, epochs=1, **settings)
  tokenizer = open_prepared(once).tokenizer()
  batches = train_batches(once, batch_size=1, seq_len=seq_len, seed=0)
  return [marked_row(tokenizer, _first(batch)) for batch in batches]


def _first(batch):
  return {name: _first(entry) if isinstance(entry, dict) else entry[0] for name, entry in batch.items()}


def chat_text(question, answer):
  head = "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n"
  return f"{head}{question}<|im_end|>\n<|im_start|>assistant\n[[{answer}<|im_end|>]]"


def test_weights_are_packed_and_come_back():
  for weights in ([0.0], [0, 0, 1, 1, 0.25, 0], [1.5] * 7, [1, 0, 1]):
    runs = packed(np.array(weights, np.float32))
    assert runs.dtype == np.int32 and unpacked(runs).tolist() == weights


@pytest.mark.parametrize("packing", ["best_fit", "first_fit", "none"])
def test_every_conversation_is_there_once_and_alone(job, packing):
  config = job(MANY, packing=packing, heldout_fraction=0.0)
  texts = "\n".join(rows_of(config, 3 * T))
  for row in MANY:
    assert texts.count(chat_text(row["instruction"], row["output"]) + "\n") == 1
  batch = next(train_batches(config, batch_size=4, seq_len=3 * T, seed=0))
  assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
    **dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), ((4, 3 * T), "int32")),
    "loss_weights": ((4, 3 * T), "float32"),
  }
  for segments, positions in zip(batch["segment_ids"], batch["positions"]):
    for segment in range(1, segments.max() + 1):
      assert positions[segments == segment].tolist() == list(range((segments == segment).sum()))
  assert (batch["segment_ids"].max() > 1) == (packing != "none")


def test_counts_and_the_report(job, capsys):
  from jaxllm.prepare import prepare_and_report

  config = job(MANY)
  prepared = open_prepared(config)
  [source] = prepared.sources
  trained = sum(len(row["output"]) + 1 for row in MANY)  # a byte is a token; the end of turn
  assert source.train.trained + source.heldout.trained == trained
  rest = len("system\nYou are helpful.\nuser\n\nassistant\n\n") + 5  # control tokens, but the one trained
  tokens = trained + sum(rest + len(row["instruction"]) for row in MANY)
  assert prepared.total("train", "tokens") + prepared.total("heldout", "tokens") == tokens
  assert prepare_and_report(config, T) == 0
  out = capsys.readouterr().out
  assert f"{source.train.trained:,} trained tokens in part0" in out and "example: <|im_start|>system" in out


def test_every_kind_of_file(job, tmp_path):
  import datasets
  import pyarrow.parquet

  chat = [{"messages": turns(row["instruction"], row["output"])} for row in MANY]
  chat[0]["messages"][1]["weight"] = 1.0  # the others have none, which Arrow fills up
  job(MANY)  # a tokenizer, and the first file
  (tmp_path / "list.json").write_text(json.dumps(MANY, indent=1))
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chat), tmp_path / "t.parquet")
  datasets.Dataset.from_list(chat).save_to_disk(tmp_path / "hf")
  renamed = [{"q": r["instruction"], "a": r["output"]} for r in MANY]
  (tmp_path / "renamed.jsonl").write_text("\n".join(map(json.dumps, renamed)))
  sources = {
    "0.jsonl": SourceConfig(kind="jsonl"),
    "list.json": SourceConfig(kind="json"),
    "t.parquet": SourceConfig(kind="parquet"),
    "hf": SourceConfig(kind="huggingface"),
    "renamed.jsonl": SourceConfig(kind="jsonl", format="alpaca", columns={"instruction": "q", "output": "a"}),
  }
  texts = []
  for name, source in sources.items():
    config = DataConfig(
      dir=str(tmp_path / f"data_{name}"),
      task="chat",
      packing="none",
      heldout_fraction=0.0,
      tokenizer=TokenizerConfig(path=str(tmp_path / "tokenizer")),
      sources=(dataclasses.replace(source, path=str(tmp_path / name), name="same"),),
    )
    prepare(config, log=lambda line: None)
    texts.append(sorted(rows_of(config)))
  assert len(texts[0]) == 40 and all(other == texts[0] for other in texts)


def test_a_mixture_of_formats(job):
  texts = [{"prompt": f"{n}:", "completion": " x"} for n in range(10)]
  config = job(MANY, texts, heldout_fraction=0.0)
  shares = (dataclasses.replace(config.sources[0], weight=1.0), dataclasses.replace(config.sources[1], weight=3.0))
  config = dataclasses.replace(config, sources=shares, packing="none")
  batches = train_batches(config, batch_size=40, seq_len=T, seed=0)
  assert (next(batches)["inputs"][:, 4] == 0).sum() == 30  # so many of the short ones


BAD = ['{"instruction": "x"', {"instruction": "x", "output": ""}, {"messages": [{"role": "user", "content": "x"}]}]
TAIL = [{"instruction": "x", "output": "a<|im_end|>b"}, {"messages": turns("x", "y", weight=0)}]


def test_bad_rows_are_named_and_skipped(job, tmp_path, capsys):
  with pytest.raises(DataError, match=r"0\.jsonl:41: not a JSON object: .*; mend or remove the line"):
    job([*MANY, *BAD])
  with pytest.raises(DataError, match=r"0\.jsonl:41: column 'output' must be text that is not empty"):
    job([*MANY, *BAD[1:]])
  with pytest.raises(DataError, match=r"0\.jsonl:41: message 2 .assistant. has '<\|im_end\|>' in its text"):
    job([*MANY, *TAIL])
  config = job([*MANY, *BAD, *TAIL], on_bad_row="skip", heldout_fraction=0.0)
  lines = [f"0.jsonl:{n}: " for n in range(41, 46)]
  said = [line for line in job.lines if line.startswith("skipped: ")]
  assert len(said) == 5 and all(line in text for line, text in zip(lines, said))
  prepared = open_prepared(config)
  assert prepared.sources[0].skipped_rows == 5
  assert prepared.skipped_path.read_text().count("\n") == 5
  clean = dataclasses.replace(config, dir=str(tmp_path / "clean"))
  (tmp_path / "0.jsonl").write_text("\n".join(map(json.dumps, MANY)))
  prepare(clean, log=lambda line: None)
  assert sorted(rows_of(config, packing="none")) == sorted(rows_of(clean, packing="none"))
  with pytest.raises(DataError, match="was prepared with another data.on_bad_row"):
    open_prepared(dataclasses.replace(config, on_bad_row="error"))


def test_other_tasks_skip_bad_rows_too(job):
  rows = [{"text": f"t {n}", "label": n % 2} for n in range(10)]
  with pytest.raises(DataError, match=r"0\.jsonl:11: label 7 is not one of data.labels"):
    job([*rows, {"text": "x", "label": 7}], task="classification", packing="none", labels=("a", "b"))
  settings = dict(task="classification", packing="none", labels=("a", "b"), on_bad_row="skip", heldout_fraction=0.0)
  config = job([*rows, {"text": "x", "label": 7}, {"text": "no label"}], **settings)
  batches = train_batches(dataclasses.replace(config, epochs=1), batch_size=20, seq_len=16, seed=0)
  assert next(batches)["loss_weights"].sum() == 10


@pytest.mark.parametrize(
  "rows, match",
  [
    ([], "data source 'part0' is empty"),
    (BAD[1:], r"all 2 rows of data source 'part0' are bad: .*0\.jsonl:1: "),
    (TAIL, r"all 2 examples of data source 'part0' are bad: .*0\.jsonl:1: message 2 .assistant. has"),
  ],
)
def test_data_without_anything_to_learn_from(job, rows, match):
  with pytest.raises(DataError, match=match):
    job(rows, on_bad_row="skip", heldout_fraction=0.0)


LONG = [{"instruction": "a" * 30, "output": "b" * n} for n in (5, 30, 60)]  # 82 + n positions


@pytest.mark.parametrize("truncation", ["drop", "left", "right"])
def test_truncation(job, truncation):
  config = job(LONG, truncation=truncation, heldout_fraction=0.0, packing="none")
  head, tail = (
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
  )
  whole = [f"{head}{'a' * 30}{tail}[[{'b' * n}<|im_end|>]]\n" for n in (5, 30, 60)]
  texts = {text.rpartition("\n(")[0] for text in rows_of(config, 100)}
  [(_, report), _] = example_rows(config, open_prepared(config), 100)
  lost = {"drop": "2 of 3 left out, 0 cut", "left": "0 of 3 left out, 2 cut", "right": "0 of 3 left out, 2 cut"}
  assert lost[truncation] in report
  assert whole[0] in texts and len(texts) == {"drop": 1, "left": 3, "right": 2}[truncation]  # right: alike
  for text in texts - {whole[0]}:
    if truncation == "right":
      assert any(text.endswith("b]]") and one.startswith(text.removesuffix("]]")) for one in whole[1:])
    else:
      assert any(one.endswith(text) for one in whole[1:])
  batch = next(train_batches(config, batch_size=3, seq_len=100, seed=0))
  assert ((batch["segment_ids"] > 0).sum(1) == 100).sum() == (0 if truncation == "drop" else 2)


def test_truncation_that_leaves_nothing_to_learn(job):
  config = job(LONG, truncation="right", heldout_fraction=0.0, packing="none")
  with pytest.raises(
    DataError, match="each of 3 examples is over training.seq_len 60.*'right' leaves nothing to learn"
  ):
    train_batches(config, batch_size=1, seq_len=60, seed=0)
  [(name, value), (example, text)] = example_rows(
    dataclasses.replace(config, truncation="left"), open_prepared(config), 90
  )
  assert (name, value) == ("truncation", "part0: 0 of 3 left out, 2 cut (data.truncation 'left' at 90)")
  assert example == "example" and "[[bbbbb<|im_end|>]]" in text


def test_pairs(job):
  config = job(PAIRS, task="preference", packing="none", heldout_fraction=0.0)
  for text in rows_of(config):
    chosen, rejected = text.removeprefix("chosen: ").split("\nrejected: ")
    n = int(chosen.split("user\n")[1].split("+")[0])
    assert chosen.startswith(chat_text(f"{n}+1?", f"It is {n + 1}."))
    assert rejected.startswith(chat_text(f"{n}+1?", f"It is {n}."))
  batch = next(train_batches(config, batch_size=3, seq_len=T, seed=0))
  assert list(batch) == ["chosen", "rejected"]
  shapes = [{name: a.shape for name, a in side.items()} for side in batch.values()]
  assert shapes[0] == shapes[1] and set(shapes[0].values()) == {(3, T)}


@pytest.mark.parametrize("truncation", ["drop", "left", "right"])
def test_sides_of_a_pair_are_cut_alike(job, truncation):
  lengths = ((1, 1), (30, 2), (2, 30), (60, 60))
  rows = [{"instruction": "a" * 30, "chosen": "bbb" + "c" * n, "rejected": "bbb" + "d" * m} for n, m in lengths]
  config = job(rows, task="preference", packing="none", heldout_fraction=0.0, truncation=truncation)
  whole, short = (
    list(train_batches(dataclasses.replace(config, epochs=1), batch_size=1, seq_len=n, seed=0)) for n in (200, 100)
  )
  assert len(whole) == 4 and len(short) == (1 if truncation == "drop" else 4)
  for batch in short:
    chosen, rejected = batch["chosen"], batch["rejected"]
    prompt = int(np.flatnonzero(chosen["loss_weights"][0])[0])  # position of the first target that is trained
    assert prompt == int(np.flatnonzero(rejected["loss_weights"][0])[0])
    assert (chosen["inputs"][0, : prompt + 4] == rejected["inputs"][0, : prompt + 4]).all()  # "bbb" is shared too
    assert (chosen["targets"] != rejected["targets"]).any()
    if truncation == "left":  # all of both answers is there
      for side in (chosen, rejected):
        last = int(side["segment_ids"][0].sum()) - 2  # the line break stands behind the end of turn
        assert side["loss_weights"][0, last] == 1


def test_bad_pairs_name_their_line(job):
  row = {"instruction": "x", "chosen": "a", "rejected": "b"}
  with pytest.raises(DataError, match=r"0\.jsonl:2: chosen and rejected are the same"):
    job([row, {**row, "rejected": "a"}], task="preference", packing="none")
  for packing in ("best_fit", "split"):
    with pytest.raises(ConfigError, match="data.task 'preference' has one example a row; set data.packing to 'none'"):
      DataConfig(task="preference", packing=packing)
  with pytest.raises(ConfigError, match="data.chat.train_on 'all' has no meaning"):
    DataConfig(task="preference", packing="none", chat=ChatConfig(train_on="all"))


@pytest.mark.parametrize("task", ["chat", "preference"])
def test_what_is_asked_in_a_heldout_row_is_asked_in_no_other(job, task):
  pairs = [{"prompt": f"{n % 12}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(60)]
  chats = [[{"instruction": f"{n % 12}?", "output": f"answer {n}"} for n in part] for part in (range(36), range(24))]
  packing = "none" if task == "preference" else "best_fit"
  prepared = open_prepared(job(*([pairs] if task == "preference" else chats), task=task, packing=packing))
  tokenizer, asked = prepared.tokenizer(), {}
  for split in ("train", "heldout"):
    documents = [prepared.documents(source, split) for source in prepared.sources]
    asked[split] = {tokenizer.decode(each.parts(n)[0]) for each in documents for n in range(len(each))}
  assert asked["heldout"] and asked["train"] and not asked["heldout"] & asked["train"]
  assert len(asked["heldout"] | asked["train"]) == 12
  assert prepared.total("heldout", "documents") == 5 * len(asked["heldout"])


@pytest.mark.parametrize("others", [0, 1, 5])
def test_a_question_of_more_rows_than_are_to_be_held_out_is_trained_on(job, others):
  rows = [{"instruction": "why?", "output": str(n)} for n in range(20)]
  rows += [{"instruction": f"why {n}?", "output": str(n)} for n in range(others)]
  prepared = open_prepared(job(rows))
  assert prepared.total("train", "documents") >= 20
  assert bool(prepared.total("heldout", "documents")) == bool(others)


@pytest.mark.parametrize("task, rows", [("chat", MANY), ("preference", PAIRS)])
def test_hosts_and_resume(job, task, rows):
  config = job(rows, task=task, packing="none" if task == "preference" else "best_fit")
  leaves = jax.tree.leaves
  options = dict(batch_size=4, seq_len=T, seed=3)
  whole = train_batches(config, **options)
  batches = [next(whole) for _ in range(12)]  # over several epochs
  halves = [train_batches(config, **options, rows=part) for part in ([0, 2], [1, 3])]
  for batch in batches:
    for part, half in zip(([0, 2], [1, 3]), halves):
      for a, b in zip(leaves(batch), leaves(next(half))):
        np.testing.assert_array_equal(a[part], b)
  again = train_batches(config, **options)
  for _ in range(5):
    next(again)
  state = json.loads(json.dumps(again.get_state()))
  resumed = train_batches(dataclasses.replace(config, workers=1), **options)
  resumed.set_state(state)
  for batch in batches[5:8]:
    for a, b in zip(leaves(batch), leaves(next(resumed))):
      np.testing.assert_array_equal(a, b)
  resumed.close()
  other = train_batches(dataclasses.replace(config, truncation="left"), **options)
  with pytest.raises(DataError, match="belongs to other data settings"):
    other.set_state(state)
  heldout = heldout_batches(config, batch_size=4, seq_len=T)
  assert len(heldout) and heldout.bytes is None
  assert [a.tobytes() for b in heldout for a in leaves(b)] == [a.tobytes() for b in heldout for a in leaves(b)]
  with pytest.raises(DataError, match=f"was prepared for data.task '{task}', not for 'text'"):
    heldout_batches(DataConfig(dir=config.dir), batch_size=4, seq_len=T, prepared=open_prepared(config))


def test_masks_belong_to_the_data(job, tmp_path):
  """A run does not go on with another template or another choice of what is trained."""
  config = job(MANY)
  first = open_prepared(config)
  assert prepare(config, log=lambda line: None).already
  with pytest.raises(DataError, match="prepared with another data.chat"):
    open_prepared(dataclasses.replace(config, chat=ChatConfig(train_on="all")))
  (tmp_path / "t.jinja").write_text(CHATML.replace("You are helpful.", "Be brief."))
  named = dataclasses.replace(config, chat=ChatConfig(template=str(tmp_path / "t.jinja")))
  info = prepare(named, log=lambda line: None)
  assert not info.already and info.prepared.content != first.content
  assert "Be brief." in info.prepared.tokenizer().render_chat([{"role": "user", "content": "x"}])
  (tmp_path / "t.jinja").write_text(CHATML)
  again = prepare(named, log=lambda line: None)
  assert not again.already and again.prepared.content != info.prepared.content
  with pytest.raises(DataError, match="cannot read data.chat.template"):
    prepare(dataclasses.replace(config, chat=ChatConfig(template="nowhere.jinja")))


def test_rows_in_colour(job):
  config = job(MANY, heldout_fraction=0.0)
  batch = next(train_batches(config, batch_size=2, seq_len=3 * T, seed=0))
  tokenizer = open_prepared(config).tokenizer()
  plain, colour = first_row(tokenizer, batch), first_row(tokenizer, batch, colour=True)
  assert plain.count("[[") == plain.count("<|im_end|>]]") == batch["segment_ids"][0].max()
  assert colour.replace("\x1b[1;32m", "[[").replace("\x1b[0m", "]]") == plain
  assert plain.endswith(f"targets trained, {(batch['segment_ids'][0] == 0).sum()} of padding)")
