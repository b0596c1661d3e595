"""StarCoder 2 (arXiv 2402.19173): LayerNorm, biases and a plain MLP."""

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import read_rope, write_rope

STARCODER2 = t.Family(
  "starcoder2",
  "Starcoder2ForCausalLM",
  llama.without("norm_eps", "head_dim")
  | {"norm_eps": "norm_epsilon", "sliding_window": "sliding_window"}
  | dict.fromkeys(t.ALL_BIASES, "use_bias"),
  (*llama.FRAME, *t.linears("blocks/mlp", f"{llama.LAYER}.mlp", up="c_fc", down="c_proj"), *llama.PRE_NORMS),
  gated=False,
  fields={"norm": "layernorm"},
  read=read_rope,
  write=write_rope,
)
