"""Parts that a `ModelConfig` may have: stretched positions, experts, latent attention, adapters."""

import dataclasses
from typing import Annotated, Literal

from jaxllm.base import ranges
from jaxllm.base.errors import ConfigError
from jaxllm.base.ranges import Amount, Count, Positive, Range, Share

# No model comes near these; beyond them sizes of arrays overflow.
MAX_LAYERS = 4096
Width = Annotated[int, Range(1, 2**20)]
WidthOr0 = Annotated[int, Range(0, 2**20)]
Layers = Annotated[int, Range(1, MAX_LAYERS)]
LayersOr0 = Annotated[int, Range(0, MAX_LAYERS)]
Heads = Annotated[int, Range(1, 2**14)]
HeadsOr0 = Annotated[int, Range(0, 2**14)]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Stretches RoPE to contexts longer than the model was trained on.

  linear: positions / factor (Chen et al., arXiv 2306.15595). ntk: theta grown so that the slowest wave
  is stretched by factor (bloc97, 2023). yarn: Peng et al., arXiv 2309.00071. llama3: Llama 3.1's
  smoothed per-frequency factor (arXiv 2407.21783).

  Two go by the text's length (`ModelConfig.rope_switch`). dynamic: ntk, with the factor that stretches the original
  context to it. longrope: a factor for each frequency, long ones where the text is longer than that (arXiv 2402.13753).
  """

  kind: Literal["linear", "ntk", "yarn", "llama3", "dynamic", "longrope"] = "linear"
  factor: Positive = 1.0
  original_max_seq_len: Count = 0  # the context before stretching; all but linear and ntk need it
  short_factors: tuple[Positive, ...] = ()  # longrope
  long_factors: tuple[Positive, ...] = ()  # longrope
  low_freq_factor: Positive = 1.0  # llama3
  high_freq_factor: Positive = 4.0  # llama3
  beta_fast: Positive = 32.0  # yarn
  beta_slow: Positive = 1.0  # yarn
  # None: yarn: 0.1 ln(factor) + 1; longrope: (1 + ln(factor) / ln(original_max_seq_len)) ** 0.5
  attention_factor: Positive | None = None
  truncate: bool = True  # yarn: the dimensions between which it blends are whole numbers
  mscale_all_dim: Amount | None = None  # yarn, DeepSeek: scores grow by (0.1 mscale_all_dim ln(factor) + 1) ** 2

  def __post_init__(self):
    ranges.check(RopeScaling, vars(self), "model.rope_scaling")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Experts in place of the feed-forward block: each token goes to a few of them.

  Mixtral (arXiv 2401.04088), Qwen3-MoE (2505.09388), DeepSeek-V2 (2405.04434) and V3 (2412.19437).
  """

  num_experts: Layers = 8
  top_k: Layers = 2  # experts of a token
  mlp_dim: WidthOr0 = 0  # of one expert; 0: model.mlp_dim
  shared_mlp_dim: WidthOr0 = 0  # of the experts that every token goes through, together; 0: none
  first_dense_layers: LayersOr0 = 0  # these keep the plain feed-forward block
  every: Layers = 1  # and so do all but the every-th of the others: layers 1, 3, … are sparse when it is 2

  scoring: Literal["softmax", "sigmoid"] = "softmax"
  bias: bool = False  # of the router and of each expert's matrices (gpt-oss)
  correction_bias: bool = False  # per expert, added to the scores where experts are chosen (DeepSeek-V3)
  normalize: bool = True  # the weights of a token's experts are divided by their sum
  scale: Positive = 1.0  # and multiplied by this
  # Experts are chosen from `top_groups` of these groups: those with the best expert, or, with sigmoid
  # scores, with the best sum of two.
  num_groups: Layers = 1
  top_groups: Layers = 1

  # None: dropless. Else an expert takes so many times its even share of a sequence; tokens beyond that pass
  # it by on the residual stream. A training measure: cached decoding drops nothing.
  capacity_factor: Positive | None = None
  load_balance_weight: Amount = 0.01  # of the two auxiliary losses, see `jaxllm.models.moe.router_losses`
  z_weight: Amount = 0.001

  def __post_init__(self):
    ranges.check(MoEConfig, vars(self), "model.moe")
    if not 1 <= self.top_k <= self.num_experts:
      raise ConfigError(f"model.moe.top_k is {self.top_k}; it must be between 1 and num_experts {self.num_experts}")
    size, rest = divmod(self.num_experts, self.num_groups)
    if rest or not 1 <= self.top_groups <= self.num_groups or self.top_groups * size < self.top_k:
      raise ConfigError(
        f"model.moe cannot choose {self.top_k} of {self.num_experts} experts in {self.top_groups} of "
        f"{self.num_groups} groups; change num_groups or top_groups"
      )
    if self.bias and (self.shared_mlp_dim or self.capacity_factor is not None):
      raise ConfigError("model.moe.bias goes with neither shared_mlp_dim nor capacity_factor")


@dataclasses.dataclass(frozen=True)
class MLAConfig:
  """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values are made
  from a short vector per token, and only that is cached."""

  kv_lora_rank: Width = 512
  q_lora_rank: Width | None = None  # None: queries come straight from the residual stream
  nope_head_dim: Width = 128  # of a query or key head: the part without position
  rope_head_dim: Width = 64  # and the rotated part, which all key heads share
  value_head_dim: Width = 128
  norm_eps: Share | None = None  # of the norms of short vectors; None: model.norm_eps

  def __post_init__(self):
    ranges.check(MLAConfig, vars(self), "model.mla")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """What stands in a block beside its own parts; see `jaxllm.models.adapters`."""

  bottleneck_dim: WidthOr0 = 0  # of a small block after attention and one after the feed-forward; 0: none
  prefix_len: WidthOr0 = 0  # virtual tokens in each layer's attention

  def __post_init__(self):
    ranges.check(AdapterConfig, vars(self), "model.adapter")
