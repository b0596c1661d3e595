"""A tokenizer of bytes with a chat template, for tests."""

TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer():
  """259 tokens: bytes, the end of a text, and the beginning and the end of a turn."""
  import tokenizers

  from jaxllm.data.tokenizers import HuggingFaceTokenizer, byte_alphabet

  rust = tokenizers.Tokenizer(tokenizers.models.BPE(byte_alphabet(), []))
  rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  rust.decoder = tokenizers.decoders.ByteLevel()
  rust.add_special_tokens(["</s>", "<|im_start|>", "<|im_end|>"])
  return HuggingFaceTokenizer(rust.to_str(), {"eos_token": "</s>", "chat_template": TEMPLATE})
