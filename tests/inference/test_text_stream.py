"""Streaming text: characters stay whole, stop strings never show."""

import random

import pytest
from tiny_models import BOS, EOS, ByteTokenizer, huggingface_bytes

from jaxllm.inference.text import SpecialText, TextStream

BYTES = ByteTokenizer()
TEXT = "naïve 数学 🎉 e\u0301 end"


class Pieces(ByteTokenizer):
  """A vocabulary of whole strings."""

  def __init__(self, *pieces):
    self.pieces, self.vocab_size = [p if isinstance(p, bytes) else p.encode() for p in pieces], len(pieces)

  def decode_bytes(self, ids):
    return b"".join(self.pieces[i] for i in ids)


def run(stream, ids):
  parts = []
  for token in ids:
    parts.append(stream.push(token))
    if stream.stopped is not None:
      break
  return [*parts, stream.finish()]


def test_multi_byte_characters_arrive_whole():
  parts = run(TextStream(BYTES, list(b"> ")), TEXT.encode())
  assert "".join(parts) == TEXT and not any("\ufffd" in part for part in parts)
  assert "🎉" in parts


def test_bytes_that_are_no_text_become_replacements():
  data = bytes(random.Random(0).choices(range(256), k=400))
  assert "".join(run(TextStream(BYTES, list(b"ab")), data)) == data.decode("utf-8", "replace")
  assert run(TextStream(BYTES, [65]), "é".encode()[:1]) == ["", "\ufffd"]


def test_a_character_that_the_prompt_began():
  whole = "é".encode()
  assert "".join(run(TextStream(BYTES, [*b"x", whole[0]]), [whole[1], *b"y"])) == "éy"


def test_what_a_prompt_ends_in_is_not_echoed():
  literal, half = "\ufffd".encode(), "🎉".encode()[:2]
  for prompt in (b"look: " + literal, b"look: " + half, b"x" + literal + half, literal + literal):
    assert "".join(run(TextStream(BYTES, list(prompt)), b" next")) == " next"
  assert "".join(run(TextStream(BYTES, list(b"x" + literal)), literal + b"y")) == "\ufffdy"
  assert "".join(run(TextStream(BYTES, list(b"x" + literal + half)), "🎉".encode()[2:] + b"y")) == "🎉y"


def test_ids_that_no_token_has_are_nothing():
  tokenizer = huggingface_bytes()
  ids = [*tokenizer.encode("é"), tokenizer.vocab_size + 5, *tokenizer.encode("🎉 a"), 10**6]
  ids[1:1] = [tokenizer.vocab_size]
  assert tokenizer.decode(ids) == "é🎉 a" == "".join(run(TextStream(tokenizer, ids[-2:]), ids))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stop_string_across_tokens(size):
  text = "one two STOP three"
  tokenizer = Pieces(*[text[i : i + size] for i in range(0, len(text), size)])
  stream = TextStream(tokenizer, [], ("STOP", "never"))
  parts = run(stream, range(tokenizer.vocab_size))
  assert "".join(parts) == "one two " and stream.stopped == "STOP"


def test_nothing_of_a_stop_string_is_shown_too_early():
  stream = TextStream(BYTES, [65], ("\n\nQ:",))
  shown = ""
  for token in b"a\nb\n\nc\n\nQ:":
    shown += stream.push(token)
    assert "a\nb\n\nc".startswith(shown)
  assert shown == "a\nb\n\nc" and stream.stopped == "\n\nQ:"


def test_what_only_began_like_a_stop_string_is_shown_in_the_end():
  assert "".join(run(TextStream(BYTES, [65], ("###",)), b"a## b##")) == "a## b##"


def test_the_first_of_several_stop_strings_wins():
  stream = TextStream(Pieces("x", "a b c"), [0], ("c", "b", "zzz"))
  assert stream.push(1) == "a " and stream.stopped == "b"


def test_stop_strings_of_many_bytes():
  stream = TextStream(BYTES, [65], ("数学",))
  assert "".join(run(stream, TEXT.encode())) == "naïve " and stream.stopped == "数学"


def test_a_space_that_depends_on_context_survives():
  class Dummy(Pieces):  # drops the space that starts a text, as SentencePiece's dummy prefix asks
    def decode_bytes(self, ids):
      return super().decode_bytes(ids).removeprefix(b" ")

  tokenizer = Dummy(" Once", " upon", "", " a")
  assert "".join(run(TextStream(tokenizer, [0]), [1, 2, 3])) == " upon a"
  assert "".join(run(TextStream(tokenizer, []), [0, 1])) == "Once upon"


def test_tokens_outside_the_vocabulary_have_no_text():
  assert "".join(run(TextStream(BYTES, [65, 300]), [66, 258, 67])) == "BC"


@pytest.mark.parametrize("seed", range(20))
def test_tidied_text_arrives_as_a_whole_decode_has_it(seed):
  transformers = pytest.importorskip("transformers")
  parts = random.Random(seed).choices(
    [" ", "'", " '", "n", "t", "'t", "m", "ve", "s", ".", " .", "re", "x", "?"], k=300
  )
  tidy = transformers.PreTrainedTokenizerBase.clean_up_tokenization(None, "".join(parts))
  tokenizer = Pieces(*parts)
  tokenizer.tidies = True
  shown = run(TextStream(tokenizer, []), range(300))
  assert "".join(shown) == tidy and sum(map(bool, shown)) > 20


def test_a_stop_string_may_be_shown():
  stream = TextStream(BYTES, [65], ("\n\n", "##"), include_stop=True)
  assert "".join(run(stream, b"a\nb\n\nc")) == "a\nb\n\n" and stream.stopped == "\n\n"


def test_early_tokens_cannot_stop():
  stream = TextStream(BYTES, [65], ("ab",))
  shown = [stream.push(token, may_stop=place > 3) for place, token in enumerate(b"xabaab")]
  # The second "ab" begins behind the fourth token; what was shown before is not looked at again.
  assert "".join(shown) == "xaba" and stream.stopped == "ab"
  assert "".join(run(TextStream(BYTES, [65], ("ab",)), b"xabaab")) == "x"


def test_special_tokens_can_be_shown():
  tokenizer = huggingface_bytes()
  ids = [BOS, *b"ab", EOS, EOS, *b"c"]
  assert SpecialText(tokenizer).decode(ids) == "<bos>ab<eos><eos>c"
  assert "".join(run(TextStream(SpecialText(tokenizer), [65]), ids)) == "<bos>ab<eos><eos>c"
  assert tokenizer.decode(ids) == "abc"
