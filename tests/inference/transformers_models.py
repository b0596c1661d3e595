"""Tiny random models of transformers, and the same as ours."""

import functools

import torch
import transformers
from checkpoint_arrays import params_from_huggingface

from jaxllm.inference.model import Model

V = 40
T5 = dict(vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2)
T5 |= dict(pad_token_id=0, eos_token_id=1, relative_attention_num_buckets=8, relative_attention_max_distance=12)
T5 |= dict(decoder_start_token_id=0, n_positions=64)
BART = dict(vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=64)
BART |= dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
BART |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2, decoder_start_token_id=3, forced_eos_token_id=None)
LLAMA = dict(vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
LLAMA |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2, max_position_embeddings=64)
# Of these one way to search: they differ in the model and not in the search.
MORE = {
  "MBartForConditionalGeneration": BART,
  "M2M100ForConditionalGeneration": BART,
  "MT5ForConditionalGeneration": T5,
}
CASES = {"T5ForConditionalGeneration": T5, "BartForConditionalGeneration": BART, "LlamaForCausalLM": LLAMA}


@functools.cache
def models(name):
  """(transformers model, ours) with weights that make texts end now and then."""
  cls = getattr(transformers, name)
  torch.manual_seed(0)
  theirs = cls(cls.config_class(**(CASES | MORE)[name])).eval()
  with torch.no_grad():
    for p in theirs.parameters():
      if p.ndim > 1:
        own = 0.7 if name.startswith("MBart") else 1.5  # with the larger one it says its first token again and again
        p.copy_(torch.randn_like(p) * (own if p.shape[0] == V else 1.0) * p.shape[-1] ** -0.5)
    if name.startswith("Bart"):  # the end is likelier than one token of many
      theirs.final_logits_bias[0, 1] = 1.5
  tensors = {key: x.numpy() for key, x in theirs.state_dict().items() if key not in (theirs._tied_weights_keys or {})}
  if name.startswith("Llama"):
    tensors["lm_head.weight"] = theirs.lm_head.weight.detach().numpy()
  config, params = params_from_huggingface(theirs.config.to_dict() | (CASES | MORE)[name], tensors)
  return theirs, Model(config, params, generation={"eos_token_id": 1})
