"""One tokenizer interface over SentencePiece models and Hugging Face tokenizer files."""

from jaxllm.data.tokenizers.added import with_tokens
from jaxllm.data.tokenizers.base import Ids, Tokenizer
from jaxllm.data.tokenizers.export import as_huggingface
from jaxllm.data.tokenizers.files import find_tokenizer, load_tokenizer
from jaxllm.data.tokenizers.huggingface import HuggingFaceTokenizer, byte_alphabet
from jaxllm.data.tokenizers.sentencepiece import SentencePieceTokenizer

__all__ = [
  "as_huggingface",
  "HuggingFaceTokenizer",
  "Ids",
  "SentencePieceTokenizer",
  "Tokenizer",
  "byte_alphabet",
  "find_tokenizer",
  "load_tokenizer",
  "with_tokens",
]
