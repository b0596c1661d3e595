"""Llama, and what the many families share that are Llama with a few settings of their own."""

from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import read_rope, write_rope

KEYS = t.KEYS | {"num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "norm_eps": "rms_norm_eps"}
# of keys that some of the classes made after LlamaConfig lack
DEFAULTS = {"head_dim": None, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}

LAYER = "model.layers.{layer}"
# All but the feed-forward and the norms around the parts
FRAME = (
  t.embedding("embedding/tokens", "model.embed_tokens"),
  *t.linears("blocks/attention", f"{LAYER}.self_attn", query="q_proj", key="k_proj", value="v_proj", output="o_proj"),
  *t.norm("blocks/attention/query_norm", f"{LAYER}.self_attn.q_norm"),
  *t.norm("blocks/attention/key_norm", f"{LAYER}.self_attn.k_norm"),
  *t.norm("final_norm", "model.norm"),
  *t.linear("head", "lm_head"),
)
MLP = t.linears("blocks/mlp", f"{LAYER}.mlp", gate="gate_proj", up="up_proj", down="down_proj")
FUSED_MLP = (
  *t.linear(t.GATE_UP, f"{LAYER}.mlp.gate_up_proj", t.ROWS),
  *t.linear("blocks/mlp/down", f"{LAYER}.mlp.down_proj"),
)
PRE_NORMS = (
  *t.norm("blocks/attention_norm", f"{LAYER}.input_layernorm"),
  *t.norm("blocks/mlp_norm", f"{LAYER}.post_attention_layernorm"),
)


def without(*fields):
  """KEYS but for those of these fields."""
  return {ours: theirs for ours, theirs in KEYS.items() if ours not in fields}


def read(hf):
  return read_rope(hf) | {"mlp_bias": hf["mlp_bias"]}


def write(c):
  return write_rope(c) | ({"mlp_bias": True} if c.mlp_bias else {})


LLAMA = t.Family(
  "llama",
  "LlamaForCausalLM",
  KEYS | t.BIASES,
  FRAME + MLP + PRE_NORMS,
  defaults=DEFAULTS,
  read=read,
  write=write,
)
