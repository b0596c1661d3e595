"""GGUF files (llama.cpp, Ollama), read and written as Hugging Face checkpoints."""

from jaxllm.interop.gguf.checkpoint import GgufCheckpoint, read_gguf
from jaxllm.interop.gguf.writer import write_gguf

__all__ = ["GgufCheckpoint", "read_gguf", "write_gguf"]
