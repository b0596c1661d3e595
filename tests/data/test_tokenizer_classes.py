"""The declared class decides how files are read: equal to `AutoTokenizer` for generated variants of files."""

import functools
import io
import json
import shutil

import pytest
import sentencepiece
import tokenizers
from tokenizers import processors

from jaxllm.base.errors import DataError
from jaxllm.data.tokenizers import as_huggingface, load_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
  "the river",
  " The river,  runs 1234 don't\n\nstop ",
  "na\u00efve caf\u00e9 \u4f60\u597d \U0001f642",
  "a<s>b</s> c <mask> d",
  "x [CLS] y[SEP] <|endoftext|> z",
  "<|turn|>the river<|turn|> <|turn|> a",
  "\u2581x \u2581 y",
  "do n't x . y ' s , 's  ' ve ' ' ' z",
  "",
]
CORPUS = [
  "the river runs past the old mill and the baker sells bread, don't stop 12 345\n",
  "na\u00efve caf\u00e9 x y z",
] * 20
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@functools.cache
def byte_level(special):
  """vocab.json, merges.txt and tokenizer.json."""
  trained = tokenizers.ByteLevelBPETokenizer()
  trained.train_from_iterator(CORPUS, vocab_size=330, special_tokens=list(special), show_progress=False)
  definition = json.loads(trained.to_str())
  merges = "".join(" ".join(pair) + "\n" for pair in definition["model"]["merges"])
  return {"vocab.json": json.dumps(definition["model"]["vocab"]), "merges.txt": merges}, trained.to_str()


@functools.cache
def sentencepiece_model(kind, **settings):
  model = io.BytesIO()
  settings = {"byte_fallback": kind == "bpe", "normalization_rule_name": "identity", **settings}
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text.strip() for text in CORPUS), model_writer=model, model_type=kind, minloglevel=2,
    vocab_size=340 if kind == "bpe" else 60, hard_vocab_limit=False, **settings,
  )  # fmt: skip
  return model.getvalue()


def write(directory, files, settings=None, model_type=None):
  """A model's tokenizer files."""
  shutil.rmtree(directory, ignore_errors=True)
  directory.mkdir()
  if settings is not None:
    files = files | {"tokenizer_config.json": json.dumps(settings)}
  if model_type is not None:
    files = files | {"config.json": json.dumps({"model_type": model_type})}
  for name, content in files.items():
    (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  return directory


def same(directory, pairs=True):
  """Asserts that both read the files alike; returns theirs."""
  theirs, ours = transformers.AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
  # Tokens of its class that no file has get ids there that no model has.
  invented = {token for token, i in theirs.get_vocab().items() if i >= ours.vocab_size}
  assert invented <= {"<|endoftext|>", "<mask>", "<pad>", "<bos>", "<eos>"}
  for text in (text for text in TEXTS if not any(token in text for token in invented)):
    for special in (True, False):
      want = theirs(text, add_special_tokens=special)["input_ids"]
      got = ours.encode_prompt(text, add_special=special).tolist()
      assert got == want, (text, theirs.convert_ids_to_tokens(got), theirs.convert_ids_to_tokens(want))
    if pairs and text:
      want = theirs(text, "the mill", return_token_type_ids=True)
      ids, types = ours.encode_pair(text, "the mill")
      assert (ids.tolist(), types.tolist()) == (want["input_ids"], want["token_type_ids"])
    want = theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
    if theirs.unk_token_id not in theirs(text)["input_ids"]:
      assert ours.decode(theirs(text)["input_ids"]) == want
  for role in ("bos", "eos", "pad", "unk", "mask", "cls", "sep"):
    want = getattr(theirs, f"{role}_token_id")
    if want is not None and want < ours.vocab_size:
      assert getattr(ours, f"{role}_id") == want
  assert ours.padding_side == theirs.padding_side
  return theirs


COHERE = ["<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"]
GPT2_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
BYTE_LEVEL = [
  ("GPT2Tokenizer", "gpt2", ["<|endoftext|>"], {}),
  ("GPT2Tokenizer", "gpt2", ROBERTA, GPT2_ROLES | {"clean_up_tokenization_spaces": True}),
  ("GPT2Tokenizer", "gptj", ROBERTA, GPT2_ROLES | {"add_bos_token": True, "add_eos_token": True}),
  ("GPT2Tokenizer", "opt", ROBERTA, dict.fromkeys(("bos_token", "eos_token"), "</s>") | {"add_bos_token": True}),
  ("GPT2Tokenizer", "starcoder2", ["<|endoftext|>"], {"add_prefix_space": True}),
  ("RobertaTokenizer", "roberta", ROBERTA, {}),
  ("RobertaTokenizer", "roberta", ROBERTA, {"add_prefix_space": True, "mask_token": "<mask>"}),
  ("RobertaTokenizer", "data2vec-text", ROBERTA, {}),
  ("BartTokenizer", "bart", ROBERTA, {"add_bos_token": False}),
  ("GPTNeoXTokenizer", "gpt_neox", ["<|endoftext|>", "<|padding|>"], {}),
  ("GPTNeoXTokenizer", "gpt_neox", ["<|endoftext|>", "<|padding|>"], {"add_bos_token": True}),
  ("Qwen2Tokenizer", "qwen2", ["<|endoftext|>"], {}),
  ("Qwen2Tokenizer", "qwen3", ["<|endoftext|>"], {"add_bos_token": True, "bos_token": "<|endoftext|>"}),
  ("CohereTokenizer", "cohere", COHERE, {}),
]  # fmt: skip


@pytest.mark.parametrize("name, model_type, special, settings", BYTE_LEVEL)
@pytest.mark.parametrize("suffix", ["", "Fast"])
def test_vocabularies_of_bytes(tmp_path, name, model_type, special, settings, suffix):
  files, whole = byte_level(tuple(special))
  declared = {"tokenizer_class": name + suffix} | settings
  if name in ("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer"):
    for model in (model_type, None):
      same(write(tmp_path / "d", files, declared, model))
  token = special[0]
  begins = tokenizers.Tokenizer.from_str(whole)
  begins.post_processor = processors.TemplateProcessing(f"{token} $A", f"{token} $A $B:1", [(token, 0)])
  for content in (whole, begins.to_str()):
    same(write(tmp_path / "d", {"tokenizer.json": content}, declared, model_type))


def test_the_kind_of_model_decides_where_no_class_is_declared_or_a_wrong_one(tmp_path):
  files, whole = byte_level(tuple(ROBERTA))
  for model_type in ("gpt2", "roberta"):
    same(write(tmp_path / "d", files, None, model_type))
  assert load_tokenizer(tmp_path / "d").encode_prompt("a").tolist()[0] == 0
  for model_type, name in [
    ("qwen2", "LlamaTokenizer"),
    ("mistral", "LlamaTokenizer"),
    ("llama", "LlamaTokenizer"),
    ("llama", "PreTrainedTokenizerFast"),
    ("gpt2", "PreTrainedTokenizerFast"),
    ("phi3", "LlamaTokenizerFast"),
    ("granite", "GPT2Tokenizer"),
    ("falcon", "PreTrainedTokenizerFast"),
    ("bloom", "BloomTokenizerFast"),
    ("roberta", "GPT2Tokenizer"),
  ]:
    roles = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    same(write(tmp_path / "d", {"tokenizer.json": whole}, {"tokenizer_class": name} | roles, model_type))


WORDS = "the river ##s The cafe na ##ive caf\u00e9 \u4f60 \u597d , ' x y z a b c d 12 ##34 don t stop"
WORDPIECE = [
  ("BertTokenizer", "bert", BERT, {}),
  ("BertTokenizer", "bert", BERT, {"do_lower_case": False, "clean_up_tokenization_spaces": True}),
  ("DistilBertTokenizer", "distilbert", BERT, {"strip_accents": False}),
  ("ElectraTokenizer", "electra", BERT, {"tokenize_chinese_chars": False}),
  ("MPNetTokenizer", "mpnet", ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"], {}),
]


@pytest.mark.parametrize("name, model_type, special, settings", WORDPIECE)
def test_wordpieces(tmp_path, name, model_type, special, settings):
  words = WORDS.split()
  files = {"vocab.txt": "\n".join([*special, *words]) + "\n"}
  declared = {"tokenizer_class": name} | settings
  theirs = same(write(tmp_path / "d", files, declared, model_type))
  same(write(tmp_path / "d", files, None, model_type)) if not settings else None
  theirs.save_pretrained(tmp_path / "saved")
  whole = (tmp_path / "saved" / "tokenizer.json").read_text()
  same(write(tmp_path / "d", {"tokenizer.json": whole}, declared | {"do_lower_case": True}, model_type))


LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TURN = {
  "content": "<|turn|>",
  "lstrip": False,
  "rstrip": False,
  "normalized": False,
  "single_word": False,
  "special": True,
}


PROTOS = [("LlamaTokenizer", "llama"), ("LlamaTokenizer", "mistral"), ("GemmaTokenizer", "gemma")]


@pytest.mark.parametrize("name, model_type", PROTOS)
@pytest.mark.parametrize("legacy", [None, True, False])
def test_sentencepiece_models(tmp_path, name, model_type, legacy):
  model = sentencepiece_model("bpe", remove_extra_whitespaces=False)
  size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
  old = {"0": TURN | {"content": "<unk>"}, "1": TURN | {"content": "<s>"}, "2": TURN | {"content": "</s>"}}
  for flags in (
    {},
    {"lstrip": True},
    {"rstrip": True},
    {"normalized": True},
    {"single_word": True},
    {"special": False},
  ):
    settings = {"tokenizer_class": name, "added_tokens_decoder": old | {str(size): TURN | flags}} | LLAMA
    settings |= {} if legacy is None else {"legacy": legacy}
    settings |= {"add_bos_token": not flags.get("lstrip"), "add_eos_token": bool(flags.get("rstrip"))}
    settings |= {"add_prefix_space": False} if "normalized" in flags else {}
    directory = write(tmp_path / "d", {"tokenizer.model": model}, settings, model_type)
    theirs, ours = same(directory), load_tokenizer(directory)
    assert ours.vocab_size == size + 1
    # Written as a tokenizer.json, it means the same.
    as_huggingface(ours).save(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": model_type}))
    again = same(tmp_path / "hf")
    for text in TEXTS:
      assert again(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.parametrize("name, file, model_type, settings", [
  ("T5Tokenizer", "spiece.model", "t5", {"extra_ids": 10, "clean_up_tokenization_spaces": True}),
  ("T5Tokenizer", "spiece.model", "mt5", {"extra_ids": 0}),
  ("XLMRobertaTokenizer", "sentencepiece.bpe.model", "xlm-roberta", {"clean_up_tokenization_spaces": True}),
  ("MBartTokenizer", "sentencepiece.bpe.model", "mbart", {}),
  ("MBartTokenizer", "sentencepiece.bpe.model", "mbart", {"src_lang": "de_DE", "tgt_lang": "ro_RO"}),
  ("MBart50Tokenizer", "sentencepiece.bpe.model", "mbart", {"src_lang": "sl_SI", "clean_up_tokenization_spaces": True}),
  ("DebertaV2Tokenizer", "spm.model", "deberta-v2", {"do_lower_case": True, "split_by_punct": True}),
])  # fmt: skip
def test_unigram_models(tmp_path, name, file, model_type, settings):
  ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if name == "T5Tokenizer" else {}
  rule = {"normalization_rule_name": "nmt_nfkc"} if name != "DebertaV2Tokenizer" else {}
  if name == "DebertaV2Tokenizer":
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]"}
    ids |= {"eos_piece": "[SEP]", "unk_piece": "[UNK]", "control_symbols": "[MASK]"}
  model = sentencepiece_model("unigram", **ids, **rule)
  declared = {"tokenizer_class": name} | settings
  theirs = same(write(tmp_path / "d", {file: model}, declared, model_type))
  theirs.save_pretrained(tmp_path / "saved")
  same(
    write(tmp_path / "d", {"tokenizer.json": (tmp_path / "saved" / "tokenizer.json").read_text()}, declared, model_type)
  )


def test_camembert(tmp_path):
  """Its own tokenizer.json, in which the first of SentencePiece's pieces stand once more."""
  model = sentencepiece_model("unigram", bos_id=1, eos_id=2, unk_id=0, pad_id=-1)
  path = tmp_path / "m.model"
  path.write_bytes(model)
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
  vocab = [("<s>NOTUSED", 0.0), ("<pad>", 0.0), ("</s>NOTUSED", 0.0), ("<unk>", 0.0), ("<unk>NOTUSED", -100.0)]
  vocab += [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(1, pieces.get_piece_size())]
  transformers.CamembertTokenizer(vocab=[*vocab, ("<mask>", 0.0)]).save_pretrained(tmp_path / "saved")
  definition = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
  for settings in ({"tokenizer_class": "CamembertTokenizer"}, {}):
    for whole in (definition, definition | {"post_processor": None, "pre_tokenizer": None}):  # the class has its own
      same(write(tmp_path / "d", {"tokenizer.json": json.dumps(whole)}, settings, "camembert"))


@pytest.mark.parametrize(
  "name, model_type, language", [("MBartTokenizer", "mbart", "de_DE"), ("NllbTokenizer", "m2m_100", "fra_Latn")]
)
def test_languages_stand_beside_the_text(tmp_path, name, model_type, language):
  kind = getattr(transformers, name)
  kind().save_pretrained(tmp_path / "saved")
  whole = (tmp_path / "saved" / "tokenizer.json").read_text()
  settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
  for more in ({}, {"src_lang": language}, {"src_lang": language, "legacy_behaviour": True}):
    directory = write(
      tmp_path / "d", {"tokenizer.json": whole}, settings | {"tokenizer_class": name} | more, model_type
    )
    theirs = same(directory)
    assert language in theirs.convert_ids_to_tokens(theirs("a")["input_ids"]) or not more


def test_flags_of_added_tokens_beside_a_tokenizer_json(tmp_path):
  _, whole = byte_level(("<|endoftext|>",))
  rust = tokenizers.Tokenizer.from_str(whole)
  rust.add_tokens([tokenizers.AddedToken("<|turn|>", normalized=False)])
  size = rust.get_vocab_size()
  for flags in ({"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"special": False, "normalized": True}):
    token = {str(size - 1): TURN | flags, "0": TURN | {"content": "<|endoftext|>"}}
    for name, content in [
      ("GPT2Tokenizer", rust.to_str()),
      ("GPT2Tokenizer", whole),
      ("PreTrainedTokenizerFast", rust.to_str()),
    ]:
      settings = {"tokenizer_class": name, "eos_token": "<|endoftext|>", "added_tokens_decoder": token}
      same(write(tmp_path / "d", {"tokenizer.json": content}, settings, "gpt2"))


def test_ids_are_decoded_as_the_reference_does(tmp_path):
  """Each id, ids in a hole of the vocabulary and behind it, and pieces that are no bytes of a byte-level vocabulary."""
  _, whole = byte_level(("<|endoftext|>",))
  definition = json.loads(whole)
  vocabulary = definition["model"]["vocab"]
  last = max(vocabulary, key=vocabulary.get)
  definition["model"]["vocab"] |= {last: len(vocabulary) + 20, "\u2122": len(vocabulary) + 30}
  model = sentencepiece_model("bpe")
  for files in ({"tokenizer.json": json.dumps(definition)}, {"tokenizer.model": model}):
    name = "GPT2Tokenizer" if "tokenizer.json" in files else "LlamaTokenizer"
    directory = write(tmp_path / "d", files, {"tokenizer_class": name}, "gpt2" if name[0] == "G" else "llama")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    for i in range(ours.vocab_size + 50):
      assert ours.decode([i]) == theirs.decode([i], skip_special_tokens=True), i
      assert ours.token_text(i) == (theirs.convert_ids_to_tokens(i) or "").replace(
        "\u2581", " " if name[0] == "L" else "\u2581"
      )


def test_settings_that_are_not_known_are_said(tmp_path, caplog):
  files, _ = byte_level(("<|endoftext|>",))
  known = {
    "tokenizer_class": "GPT2Tokenizer",
    "model_max_length": 5,
    "image_token": "<|endoftext|>",
    "errors": "replace",
  }
  load_tokenizer(write(tmp_path / "d", files, known | {"split_special_tokens": False}))
  assert not caplog.records
  load_tokenizer(write(tmp_path / "d", files, known | {"word_tokenizer_type": "mecab", "split_special_tokens": True}))
  load_tokenizer(write(tmp_path / "d", files, known | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
  assert "auto_map names code of its own, which is not run here" in caplog.text
  assert "'word_tokenizer_type', 'split_special_tokens': not known" in caplog.text


def test_a_class_without_its_tokens_is_refused(tmp_path):
  _, whole = byte_level(("<|endoftext|>",))
  with pytest.raises(DataError, match="RobertaTokenizer puts its cls_token around texts.*<s>"):
    load_tokenizer(write(tmp_path / "d", {"tokenizer.json": whole}, {"tokenizer_class": "RobertaTokenizer"}))
  with pytest.raises(DataError, match="M2M100Tokenizer has pieces of its model and ids of vocab.json"):
    load_tokenizer(write(tmp_path / "d", {"sentencepiece.bpe.model": b"", "vocab.json": "{}"}, None, "m2m_100"))


def test_special_tokens_as_objects_are_saved_as_the_reference_reads_them(tmp_path, caplog):
  _, whole = byte_level(("<|endoftext|>", "<x>"))
  plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
  end = {"__type": "AddedToken", "content": "<|endoftext|>", **plain}
  settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "additional_special_tokens": ["<none>"]}
  ours = load_tokenizer(write(tmp_path / "d", {"tokenizer.json": whole}, settings))
  assert "'<none>': not in the vocabulary, so read as any text" in caplog.text
  ours.save(tmp_path / "saved")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
  assert (theirs.eos_token_id, theirs.eos_token) == (ours.eos_id, "<|endoftext|>")
