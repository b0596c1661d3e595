"""StarCoder 2 (arXiv 2402.19173): LayerNorm, biases and a plain MLP."""

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import read_rope, write_rope


def _read(hf):
  bias = hf["use_bias"]
  biases = {"attention_bias": bias, "attention_out_bias": bias, "mlp_bias": bias}
  mlp = {"mlp": t.mlp_name(hf["hidden_act"], gated=False), "sliding_window": hf.get("sliding_window")}
  return read_rope(hf) | biases | mlp


def _write(c):
  hf = {"hidden_act": t.activation_name(c.mlp), "use_bias": c.mlp_bias, "sliding_window": c.sliding_window}
  return write_rope(c) | hf


STARCODER2 = t.Family(
  "starcoder2",
  "Starcoder2ForCausalLM",
  {ours: theirs for ours, theirs in llama.KEYS.items() if ours not in ("norm_eps", "head_dim")}
  | {"norm_eps": "norm_epsilon"},
  (
    *(weight for weight in llama.WEIGHTS if not weight.ours[0].startswith("blocks/mlp")),
    *t.linear("blocks/mlp/up", f"{llama.LAYER}.mlp.c_fc"),
    *t.linear("blocks/mlp/down", f"{llama.LAYER}.mlp.c_proj"),
    *llama.PRE_NORMS,
  ),
  fields={"norm": "layernorm"},
  read=_read,
  write=_write,
)
