"""What a model reads of a prompt, a pair and a chat: equal to `transformers` for every kind of tokenizer file."""

import io
import json
import pickle
import shutil

import pytest
import sentencepiece

from jaxllm.base.errors import DataError
from jaxllm.data.tokenizers import load_tokenizer

transformers = pytest.importorskip("transformers")

SAMPLE = [
  "Hello, world!",
  "",
  " ",
  "  two  spaces and a tab\tnew\nline ",
  "na\u00efve caf\u00e9 \u00c5ngstr\u00f6m STRASSE \u0130stanbul",
  "\u4e2d\u6587\u5206\u8bcd\u548c\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8\u3002\ud55c\uad6d\uc5b4",
  "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940",
  "emoji \U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
  "def f(x):\n    return {'a': x[0] ** 2, \"b\": 1_000}  # 3.14e-10\n",
  "12345 1,234.5 \u00bd \u2460 \ufb01 don't we'll",
]
# What the special tokens are is told apart only where they are looked for.
SPECIAL = [
  "<s>a</s> b",
  "[CLS] fox [SEP] dog [MASK].",
  "x<|endoftext|> y",
  "<mask> the",
  "Hi <extra_id_0> you <extra_id_99>",
]
CORPUS = (" ".join(SAMPLE) + "\nthe quick brown fox jumps over the lazy dog; fox foxes dog dogs the end. ") * 3


def train_sentencepiece(path, **settings):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CORPUS.split("\n") * 8),
    model_writer=model,
    hard_vocab_limit=False,
    minloglevel=2,
    **settings,
  )
  path.write_bytes(model.getvalue())


def llama_sentencepiece(directory, legacy):
  train_sentencepiece(
    directory / "tokenizer.model", model_type="bpe", vocab_size=480, byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
  )  # fmt: skip
  settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, "add_eos_token": False}
  (directory / "tokenizer_config.json").write_text(json.dumps(settings))
  return transformers.LlamaTokenizer.from_pretrained(directory)


def llama(directory):
  return llama_sentencepiece(directory, legacy=False)


def llama_legacy(directory):
  return llama_sentencepiece(directory, legacy=True)


def t5(directory):
  train_sentencepiece(
    directory / "spiece.model", model_type="unigram", vocab_size=300, pad_id=0, eos_id=1, unk_id=2, bos_id=-1
  )
  (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}))
  return transformers.T5Tokenizer.from_pretrained(directory)


def bert(directory):
  words = (
    "the fox ##es dog ##s quick hello world , . ! caf ##e naive ##a a b h ##i \u4e2d \u6587 \u65e5 1 ##2 ##3 ' ( )"
  )
  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()]
  (directory / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
  return transformers.BertTokenizer.from_pretrained(directory)


def byte_level(directory, special):
  import tokenizers

  trained = tokenizers.ByteLevelBPETokenizer()
  trained.train_from_iterator([CORPUS], vocab_size=400, special_tokens=special, show_progress=False)
  trained.save_model(str(directory))


def gpt2(directory):
  byte_level(directory, ["<|endoftext|>"])
  return transformers.GPT2Tokenizer.from_pretrained(directory)


def roberta(directory):
  byte_level(directory, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
  (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
  return transformers.RobertaTokenizer.from_pretrained(directory)


def llama3(directory):
  """Byte-level BPE whose template begins a text, with added tokens that are special and that are not."""
  import tokenizers
  from tokenizers import AddedToken, processors

  trained = tokenizers.ByteLevelBPETokenizer()
  trained.train_from_iterator([CORPUS], vocab_size=400, show_progress=False)
  trained._tokenizer.add_special_tokens(["<s>", "</s>", "[CLS]"])
  trained._tokenizer.add_tokens([AddedToken("lazy", lstrip=True), "<think>"])
  bos = ("<s>", trained.token_to_id("<s>"))
  trained._tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[bos]
  )
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>", padding_side="left"
  )
  fast.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
  fast.save_pretrained(directory)
  return fast


KINDS = [llama, llama_legacy, t5, bert, gpt2, roberta, llama3]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def sides(request, tmp_path_factory):
  """(kind, ours from the files as they are found, ours from the reference's tokenizer.json, the reference)."""
  directory = tmp_path_factory.mktemp(request.param.__name__)
  reference = request.param(directory)
  saved = directory / "saved"
  reference.save_pretrained(saved)
  if request.param is llama_legacy:  # which transformers forgets
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    (saved / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": True}))
  return request.param.__name__, load_tokenizer(directory), load_tokenizer(saved), reference


@pytest.mark.parametrize("add_special", [True, False])
def test_prompts(sides, add_special):
  kind, found, saved, reference = sides
  for text in (*SAMPLE, *SPECIAL, "the <think> lazy <|turn|>dog"):
    want = reference(text, add_special_tokens=add_special)["input_ids"]
    for ours in (saved, found):
      assert ours.encode_prompt(text, add_special=add_special).tolist() == want, text


def test_pairs(sides):
  kind, found, saved, reference = sides
  texts = [text for text in SAMPLE if text]
  for first, second in zip(texts, texts[3:] + texts[:3]):
    want = reference(first, second, return_token_type_ids=True)
    for ours in (saved, found):
      ids, types = ours.encode_pair(first, second)
      assert ids.tolist() == want["input_ids"]
      if kind in ("bert", "llama3"):
        assert types.tolist() == want["token_type_ids"]
  if kind == "bert":
    ids, types = found.encode_pair("the fox", "dogs")
    assert [reference.convert_ids_to_tokens(ids.tolist()), types.tolist()] == [
      ["[CLS]", "the", "fox", "[SEP]", "dog", "##s", "[SEP]"],
      [0, 0, 0, 0, 1, 1, 1],
    ]


def test_text_comes_back_as_from_the_reference(sides):
  _, found, saved, reference = sides
  for text in (*SAMPLE, *SPECIAL):
    ids = reference(text)["input_ids"]
    want = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert saved.decode(ids) == want
    if found.unk_id not in ids:  # SentencePiece has a sign for what is unknown
      assert found.decode(ids) == want


def test_special_tokens(sides):
  _, found, saved, reference = sides
  for ours in (found, saved):
    assert ours.vocab_size == len(reference)
    for role in ("bos", "eos", "pad", "unk", "mask", "cls", "sep"):
      if (want := getattr(reference, f"{role}_token_id")) is not None:
        assert getattr(ours, f"{role}_id") == want, role
    assert ours.special_ids >= set(reference.all_special_ids)


def test_documents_hold_no_special_tokens(sides):
  kind, found, saved, reference = sides
  for ours in (found, saved):
    for text in SPECIAL:
      assert not ours.special_ids - {ours.unk_id} & set(ours.encode(text).tolist())
    for text in SAMPLE:
      assert ours.encode(text).tolist() == reference(text, add_special_tokens=False)["input_ids"]


def test_padding(sides):
  kind, _, saved, reference = sides
  if reference.pad_token is None:
    reference.pad_token = reference.eos_token
  rows = [saved.encode_prompt(text).tolist() for text in SAMPLE]
  for side in ("left", "right"):
    want = reference.pad({"input_ids": rows}, padding_side=side, return_tensors="np")
    ids, mask = saved.pad(rows, side=side)
    assert ids.tolist() == want["input_ids"].tolist()
    assert mask.tolist() == want["attention_mask"].astype(bool).tolist()
  assert saved.padding_side == reference.padding_side == ("left" if kind.startswith("llama") else "right")
  assert saved.pad(rows, length=500)[0].shape == (len(rows), 500)
  with pytest.raises(DataError, match="does not fit in 2"):
    saved.pad(rows, length=2)


def test_saved_and_pickled_it_stays_itself(sides, tmp_path):
  _, found, saved, reference = sides
  for n, ours in enumerate((found, saved)):
    ours.settings["chat_template"] = "{{ bos_token }}{{ messages[0].content }}"
    ours.save(tmp_path / str(n))
    for other in (load_tokenizer(tmp_path / str(n)), pickle.loads(pickle.dumps(ours))):
      assert other.fingerprint == ours.fingerprint and other.vocab_size == ours.vocab_size
      assert other.settings["chat_template"] == ours.settings["chat_template"]
      for text in (*SAMPLE, *SPECIAL):
        assert other.encode_prompt(text).tolist() == ours.encode_prompt(text).tolist()
  if not (tmp_path / "0" / "tokenizer.json").is_file():
    return
  loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "0")
  assert [loaded(text)["input_ids"] for text in SAMPLE] == [reference(text)["input_ids"] for text in SAMPLE]
  assert loaded.chat_template == ours.settings["chat_template"]


def test_files_that_do_not_tell_a_tokenizer(tmp_path):
  def refused(match):
    with pytest.raises(DataError, match=match):
      load_tokenizer(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()

  (tmp_path / "vocab.txt").write_text("a\nb\n")
  refused(r"no \[UNK\]")
  (tmp_path / "vocab.json").write_text("{}")
  refused("no merges.txt")
  (tmp_path / "vocab.json").write_text("nonsense")
  (tmp_path / "merges.txt").write_text("")
  refused("is not JSON")
  (tmp_path / "vocab.json").write_text('{"a": 4294967295}')  # 13 GB, where the library makes a list of it
  (tmp_path / "merges.txt").write_text("")
  refused("ids.a is 4294967295")
  (tmp_path / "vocab.json").write_text('{"a": 0}')
  (tmp_path / "merges.txt").write_text("a b c d\n")
  refused("damaged")
  byte_level(tmp_path, [])
  (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
  refused("it is a CLIPTokenizer.*tokenizer.json")
  (tmp_path / "sentencepiece.bpe.model").write_bytes(b"")
  refused("class of their own")
  for settings, match in [
    ("{", "is not JSON"),
    ("[]", "no JSON object"),
    ('{"eos_token": 3}', "key eos_token is 3"),
    ('{"chat_template": [{"name": "default"}]}', "chat_template.0 lacks .template."),
    ('{"added_tokens_decoder": {"999999999999": {"content": "a"}}}', "added_tokens_decoder has the id"),
    ('{"added_tokens_decoder": {"0": {"content": "<new>"}}}', "'<new>' cannot have id 0"),
    ('{"padding_side": "up"}', "padding_side is .up."),
  ]:
    byte_level(tmp_path, [])
    (tmp_path / "tokenizer_config.json").write_text(settings)
    refused(match)
