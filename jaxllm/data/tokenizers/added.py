"""A tokenizer with more tokens."""

from collections.abc import Sequence

from jaxllm.base.errors import DataError
from jaxllm.data.tokenizers.base import Tokenizer


def with_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
  """The tokenizer with tokens added at the end of its vocabulary, which are read in any text and stand for themselves.

  Raises:
    DataError: one is in the vocabulary already, twice among them, or empty.
  """
  known = {tokenizer.token_text(i) for i in range(tokenizer.vocab_size)}
  for i, token in enumerate(tokens):
    if not token or token in known or token in tokens[:i]:
      raise DataError(f"the token {token!r} cannot be new: it is {'empty' if not token else 'there already'}")
  plain = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  added = {str(i): dict(token) for i, token in getattr(tokenizer, "added_tokens", {}).items()}
  added |= tokenizer.settings.get("added_tokens_decoder", {})
  added |= {str(tokenizer.vocab_size + i): {"content": token, **plain} for i, token in enumerate(tokens)}
  return tokenizer.with_settings(tokenizer.settings | {"added_tokens_decoder": added})
