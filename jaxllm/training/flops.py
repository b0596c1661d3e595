"""How much arithmetic a token costs, what a chip could do, and the share of it that was used (MFU)."""

import dataclasses

from jaxllm.models.config import MLPS, ModelConfig


@dataclasses.dataclass(frozen=True)
class TokenFlops:
  """FLOPs per token of one training step, a multiply-add counting as two."""

  matmul: float  # weights times activations
  attention: float  # queries times keys, probabilities times values
  formula: str  # with the sizes filled in, for the start-up table

  @property
  def total(self) -> float:
    return self.matmul + self.attention


def matmul_parameters(config: ModelConfig) -> int:
  """Weights that multiply a token's activations: attention, feed-forward and the head, tied or not.

  Of the experts those that a token goes to count, and the router. The embedding is a lookup, norms and
  biases are elementwise; they are left out, as PaLM does.
  """
  D, N, a, moe = config.embed_dim, config.num_heads, config.mla, config.moe
  if a is None:
    attention = 2 * D * (N + config.num_kv_heads) * config.head_dim
  else:
    query, rank = N * config.head_dim, a.q_lora_rank
    attention = D * query if rank is None else (D + query) * rank
    attention += D * (a.kv_lora_rank + a.rope_head_dim) + D * N * a.value_head_dim
    attention += a.kv_lora_rank * N * (a.nope_head_dim + a.value_head_dim)
  matrices = 3 if MLPS[config.mlp][1] else 2
  mlp = matrices * D * config.mlp_dim
  crossing = config.architecture == "encoder_decoder"
  layers = config.num_layers * (2 if crossing else 1) * attention + len(config.layers_with("mlp")) * mlp
  layers += config.num_encoder_layers * (attention + mlp)
  layers += config.convolution_size * D * D
  if moe is not None:
    experts = moe.num_experts * D + matrices * D * (moe.top_k * moe.mlp_dim + moe.shared_mlp_dim)
    layers += len(config.moe_layers) * experts
  outputs = {"lm": config.vocab_size, "none": 0}.get(config.head, config.num_labels)
  W = config.head_input_dim
  layers += D * config.token_dim if config.token_dim != D else 0
  return layers + W * (outputs + (D if config.head_dense else 0))


def visible_keys(seq_len: int, window: int | None = None, sinks: int = 0, causal: bool = True) -> float:
  """Keys that a query attends to, on average over the `seq_len` positions of a full sequence."""
  if not causal:
    return float(seq_len)
  reach = seq_len if window is None else min(window + sinks, seq_len)
  return (reach * (reach + 1) / 2 + (seq_len - reach) * reach) / seq_len


def training_flops(config: ModelConfig, seq_len: int, causal: bool = True, train_weights: bool = True) -> TokenFlops:
  """FLOPs per token of forward and backward: 6 N + 12 n_heads head_dim (sum of keys seen over the layers).

  N are the `matmul_parameters`: 2 N forward, 2 N for the gradient of the activations, 2 N for that of the
  weights (PaLM, arXiv 2204.02311, appendix B); `train_weights=False` leaves the last out, as with LoRA on
  a frozen base (whose own factors are too small to count). PaLM counts attention over all `seq_len` keys;
  we count what the mask lets through (about half, and less in local layers), because that is all the
  kernels compute; `causal=False` gives PaLM's number. Recomputation (remat) is not counted, so that MFU
  measures useful work. Documents packed into one sequence are counted as one. An encoder_decoder is counted
  as reading as many tokens as it writes.
  """
  causal = causal and config.architecture != "encoder"
  weights = matmul_parameters(config)
  kinds = config.layer_kinds
  keys = [
    visible_keys(
      seq_len, config.sliding_window if kinds[i % len(kinds)] == "local" else None, config.sink_tokens, causal
    )
    for i in range(config.num_layers)
  ]
  if config.architecture == "encoder_decoder":  # every query of both stacks' other attentions sees all
    keys += [visible_keys(seq_len, causal=False)] * (config.num_layers + config.num_encoder_layers)
  passes = 6 if train_weights else 4
  mean_keys = sum(keys) / len(keys)
  # Of the products with keys and with values; both are as wide, but in latent attention.
  value_dim = config.mla.value_head_dim if config.mla else config.head_dim
  width = config.num_heads * (config.head_dim + value_dim) / 2
  return TokenFlops(
    matmul=float(passes * weights),
    attention=12.0 * width * sum(keys),
    formula=(f"{passes} x {weights:,} weights + 12 x {len(keys)} layers x {width:g} wide x {mean_keys:g} keys"),
  )


def row_flops(config: ModelConfig, target_len: int, source_len: int = 0, train_weights: bool = True) -> TokenFlops:
  """`training_flops` per position of a row, where that of an encoder_decoder has `source_len` positions to read too.

  Its decoder layers make keys and values of what was read, and every target attends to all of them.
  """
  if config.architecture != "encoder_decoder":
    return training_flops(config, target_len, train_weights=train_weights)
  T, S, layers, D = target_len, source_len, config.num_layers, config.embed_dim
  passes = 6 if train_weights else 4
  source = passes * (matmul_parameters(config.encoder) + layers * 2 * D * config.num_kv_heads * config.head_dim)
  target = passes * matmul_parameters(config) - source
  keys = T * layers * (visible_keys(T) + S) + S * config.num_encoder_layers * S
  return TokenFlops(
    matmul=(T * target + S * source) / (T + S),
    attention=12 * config.num_heads * config.head_dim * keys / (T + S),
    formula=f"({S} to read x {source:.3g} + {T} to write x {target:.3g} + attention) / {T + S}",
  )


def mfu(tokens_per_second: float, flops_per_token: float, num_devices: int, peak: float) -> float:
  """Model FLOPs utilization: the share, 0 to 1, of the devices' peak that went into the model."""
  return tokens_per_second * flops_per_token / (num_devices * peak)
