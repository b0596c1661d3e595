"""Small random models of transformers, adapters of PEFT's, and logits of a model of any program."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

IDS = np.arange(12).reshape(2, 6) * 3
SMALL = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
DECODER = SMALL | dict(num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0)
GPT2 = dict(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32)
T5 = dict(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
BART = dict(vocab_size=40, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48)
BART |= dict(encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=32)
# Name -> its class in transformers without "For…" and Config, its settings, its family
MODELS = {
  "llama": ("LlamaForCausalLM", DECODER, "llama"),
  "tied": ("LlamaForCausalLM", DECODER | dict(tie_word_embeddings=True), "llama"),
  "phi3": ("Phi3ForCausalLM", DECODER | dict(eos_token_id=1, bos_token_id=2), "phi3"),
  "gpt2": ("GPT2LMHeadModel", GPT2, "gpt2"),
  "bert": ("BertForSequenceClassification", SMALL | dict(max_position_embeddings=32, num_labels=3), "bert"),
  "qwen3": ("Qwen3ForCausalLM", DECODER | dict(head_dim=8), "qwen3"),
  "gpt_neox": ("GPTNeoXForCausalLM", SMALL | dict(max_position_embeddings=32), "gpt_neox"),
  "bart": ("BartForConditionalGeneration", BART, "bart"),
  "t5": ("T5ForConditionalGeneration", T5, "t5"),
}


def save(name: str, directory: Path) -> Path:
  """Saves a random model, biases and norms included; returns the directory."""
  import torch
  import transformers

  known, settings, _ = MODELS[name]
  torch.manual_seed(0)
  config = getattr(transformers, known.split("For")[0].removesuffix("LMHeadModel") + "Config")
  model = getattr(transformers, known)(config(**settings))
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(directory)
  return directory


def load_base(directory: Path):
  """A module of torch's."""
  import torch
  import transformers

  name = json.loads((directory / "config.json").read_text())["architectures"][0]
  return getattr(transformers, name).from_pretrained(directory, dtype=torch.float32)


def changed(model):
  """A module of PEFT's with noise in all that it trains."""
  import torch

  torch.manual_seed(1)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.requires_grad:
        noise = 0.1 * torch.randn_like(parameter)
        scaled = any(part in name for part in ("magnitude", "modules_to_save"))
        parameter.copy_(parameter * (1 + noise) if scaled else parameter + 2 * noise)
  return model


def made(family: str, folder: Path, **settings) -> tuple[Path, Path, np.ndarray]:
  """The directories of a base and of a random adapter by PEFT; and the adapted model's logits."""
  import peft

  save(family, folder / "base")
  model = changed(peft.get_peft_model(load_base(folder / "base"), peft.LoraConfig(**settings)))
  model.save_pretrained(folder / "adapter")
  return folder / "base", folder / "adapter", logits(model)


def logits(model, ids: np.ndarray = IDS) -> np.ndarray:
  """Of the same ids: by a Model here, or by a module of torch's."""
  if hasattr(model, "named_parameters"):
    import torch

    ids = torch.from_numpy(ids)
    two = getattr(model.config, "is_encoder_decoder", False)
    more = {"decoder_input_ids": ids[:, ::2].contiguous()} if two else {}
    with torch.no_grad():
      return model.eval()(input_ids=ids, **more).logits.numpy()
  ids = jnp.asarray(ids, jnp.int32)
  two = model.config.architecture == "encoder_decoder"
  return np.asarray(model(ids[:, ::2], encoder_inputs=ids) if two else model(ids))
