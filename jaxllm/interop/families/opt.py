"""OPT (arXiv 2205.01068): learned positions, LayerNorm, biases everywhere; in one of its sizes, 350m, norms after the
sums and an embedding narrower than the model."""

from jaxllm.interop.families import table as t

LAYER = "model.decoder.layers.{layer}"


def _norms(c):
  kind = "norm" if c.norm_placement == "pre" else "post_norm"
  return (
    *t.norm(f"blocks/attention_{kind}", f"{LAYER}.self_attn_layer_norm"),
    *t.norm(f"blocks/mlp_{kind}", f"{LAYER}.final_layer_norm"),
  )


def _read(hf):
  width = hf["word_embed_proj_dim"] or hf["hidden_size"]
  narrow = {"embedding_dim": width, "embedding_projection": "tokens", "head_dense": "linear"}
  before = hf["do_layer_norm_before"]
  return (narrow if width != hf["hidden_size"] else {}) | {
    "norm_placement": "pre" if before else "post",
    "final_norm": before and not hf["_remove_final_layer_norm"],
  }


def _write(c):
  return {
    "do_layer_norm_before": c.norm_placement == "pre",
    "_remove_final_layer_norm": not c.final_norm,
    "word_embed_proj_dim": c.token_dim,
  }


OPT = t.Family(
  "opt",
  "OPTForCausalLM",
  t.KEYS
  | {"mlp_dim": "ffn_dim", "init_std": "init_std", "norm_affine": "layer_norm_elementwise_affine"}
  | dict.fromkeys(t.ALL_BIASES, "enable_bias"),
  (
    t.embedding("embedding/tokens", "model.decoder.embed_tokens"),
    t.embedding("embedding/positions", "model.decoder.embed_positions"),
    *t.linear("embedding/projection", "model.decoder.project_in"),
    *t.linear("head/dense", "model.decoder.project_out"),
    *t.linears(
      "blocks/attention", f"{LAYER}.self_attn", query="q_proj", key="k_proj", value="v_proj", output="out_proj"
    ),
    *t.linears("blocks/mlp", LAYER, up="fc1", down="fc2"),
    *t.norm("final_norm", "model.decoder.final_layer_norm"),
    *t.linear("head", "lm_head"),
  ),
  activation="activation_function",
  gated=False,
  fields={"norm": "layernorm", "position": "learned", "position_offset": 2, "norm_eps": 1e-5, "init": "normal"},
  read=_read,
  write=_write,
  more_weights=_norms,
)
