"""What a model is (`ModelConfig`), and how it is to be computed (`Compute`)."""

import dataclasses
from typing import Literal

from jaxllm.errors import ConfigError

# name -> (activation, gated)
MLPS = {
  "swiglu": ("silu", True),
  "geglu": ("gelu", True),
  "geglu_tanh": ("gelu_tanh", True),
  "reglu": ("relu", True),
  "gelu": ("gelu", False),
  "gelu_tanh": ("gelu_tanh", False),
  "silu": ("silu", False),
  "relu": ("relu", False),
  "relu2": ("relu2", False),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Stretches RoPE to contexts longer than the model was trained on.

  linear: positions / factor (Chen et al., arXiv 2306.15595). ntk: theta grown so that the slowest wave
  is stretched by factor (bloc97, 2023). yarn: Peng et al., arXiv 2309.00071. llama3: Llama 3.1's
  smoothed per-frequency factor (arXiv 2407.21783).
  """

  kind: Literal["linear", "ntk", "yarn", "llama3"] = "linear"
  factor: float = 1.0
  original_max_seq_len: int = 0  # the context before stretching; yarn and llama3 need it
  low_freq_factor: float = 1.0  # llama3
  high_freq_factor: float = 4.0  # llama3
  beta_fast: float = 32.0  # yarn
  beta_slow: float = 1.0  # yarn
  attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder Transformer, as orthogonal choices; a model family is a preset of these.

  Zero in `num_kv_heads`, `head_dim` or `mlp_dim` means the usual value: `num_heads`,
  `embed_dim / num_heads`, and 4 x embed_dim (gated: 8/3 x, rounded up to a multiple of 64).
  """

  vocab_size: int = 32000
  embed_dim: int = 512
  num_layers: int = 8
  num_heads: int = 8
  num_kv_heads: int = 0
  head_dim: int = 0
  mlp_dim: int = 0
  max_seq_len: int = 2048

  # Attention
  attention_bias: bool = False  # on query, key and value
  attention_out_bias: bool = False
  qk_norm: Literal["none", "head", "full"] = "none"  # per head (Qwen3), over all heads (OLMo 2)
  query_scale: float | None = None  # None: head_dim ** -0.5
  attention_softcap: float | None = None
  sliding_window: int | None = None  # a query sees this many keys, itself included
  layer_pattern: tuple[Literal["global", "local"], ...] = ()  # repeats; (): local if there is a window
  attention_sinks: bool = False  # a learned logit per head that takes probability and gives no value
  sink_tokens: int = 0  # the first tokens of a segment stay visible past the window (arXiv 2309.17453)

  # Positions
  position: Literal["rope", "learned", "sinusoidal", "alibi", "none"] = "rope"
  rope_theta: float = 10000.0
  rope_local_theta: float | None = None  # of the local layers; None: rope_theta
  rope_fraction: float = 1.0  # of head_dim that is rotated
  rope_scaling: RopeScaling | None = None  # of the global layers

  # Norms
  norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
  norm_eps: float = 1e-5
  norm_bias: bool = True  # LayerNorm only
  norm_unit_offset: bool = False  # weight w stands for the scale 1 + w (Gemma)
  # pre: x + f(norm(x)); post: norm(x + f(x)); sandwich: x + norm(f(norm(x))); output: x + norm(f(x))
  norm_placement: Literal["pre", "post", "sandwich", "output"] = "pre"
  parallel_residual: bool = False  # x + attention(norm(x)) + mlp(norm'(x)) (GPT-NeoX)
  embedding_norm: bool = False
  final_norm: bool = True

  # Feed-forward
  mlp: str = "swiglu"
  mlp_bias: bool = False

  # Embedding and head
  tie_embeddings: bool = True
  head_bias: bool = False
  embedding_scale: float | None = None  # Gemma: embed_dim ** 0.5
  logit_softcap: float | None = None

  # Initialisation of the matrices. normal: std init_std (BERT, OPT). gpt2: also divides the std of the
  # two projections into the residual stream by sqrt(2 L) (GPT-2 report, section 2.3; Llama trainings do
  # the same). fan_in: std 1/sqrt(inputs) (T5, PaLM). small: SmallInit sqrt(2 / 5D), residual projections
  # 2 / (L sqrt(D)) (GPT-NeoX-20B, arXiv 2204.06745).
  init: Literal["normal", "gpt2", "fan_in", "small"] = "gpt2"
  init_std: float = 0.02

  def __post_init__(self):
    def fill(name, value):
      if not getattr(self, name):
        object.__setattr__(self, name, value)

    for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "max_seq_len"):
      if getattr(self, name) < 1:
        raise ConfigError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
    if self.mlp not in MLPS:
      raise ConfigError(f"model.mlp is {self.mlp!r}; choose one of {', '.join(MLPS)}")
    fill("num_kv_heads", self.num_heads)
    if not self.head_dim and self.embed_dim % self.num_heads:
      raise ConfigError(
        f"model.embed_dim {self.embed_dim} is not divisible by model.num_heads {self.num_heads}; "
        "change one, or set model.head_dim"
      )
    fill("head_dim", self.embed_dim // self.num_heads)
    gated = MLPS[self.mlp][1]
    fill("mlp_dim", -(-8 * self.embed_dim // 3 // 64) * 64 if gated else 4 * self.embed_dim)
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads {self.num_kv_heads}")
    if self.position == "rope" and self.rotary_dim % 2:
      raise ConfigError(f"RoPE rotates pairs: {self.rotary_dim} rotated dimensions is odd; change model.head_dim")
    if self.position == "sinusoidal" and self.embed_dim % 2:
      raise ConfigError(f"sinusoidal positions need an even model.embed_dim, not {self.embed_dim}")
    if "local" in self.layer_pattern and not self.sliding_window:
      raise ConfigError("model.layer_pattern has local layers but model.sliding_window is not set")
    if self.sliding_window is not None and self.sliding_window < 1:
      raise ConfigError(f"model.sliding_window is {self.sliding_window}; it must be at least 1, or None")
    for kind in self.layer_pattern:
      if kind not in ("global", "local"):
        raise ConfigError(f"model.layer_pattern holds {kind!r}; each entry is 'global' or 'local'")
    if self.parallel_residual and self.norm_placement != "pre":
      raise ConfigError(f"model.parallel_residual needs model.norm_placement 'pre', not {self.norm_placement!r}")
    scaling = self.rope_scaling
    if scaling and scaling.kind in ("yarn", "llama3") and not scaling.original_max_seq_len:
      raise ConfigError(f"model.rope_scaling.original_max_seq_len must be set for {scaling.kind} scaling")

  @property
  def rotary_dim(self) -> int:
    return int(self.head_dim * self.rope_fraction)

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """The repeating group of layer kinds; its length is the scan's stride."""
    if self.sliding_window is None:
      return ("global",)
    return tuple(self.layer_pattern) or ("local",)


@dataclasses.dataclass(frozen=True)
class Compute:
  """How a model is computed; nothing here changes what it is, and none of it is saved with it.

  `target` is the chip the program is for ("cpu", "h100", "v5p", …), so that a laptop can compile for a
  pod; the kernels choose their backends from it (see `jaxllm.kernels.backends`).
  """

  target: str = "cpu"
  dtype: str = "float32"  # of activations and of the weights as multiplied
  remat: Literal["none", "full", "dots", "offload", "names"] = "none"
  remat_names: tuple[str, ...] = ()  # for remat="names": the checkpoint names to keep
  attention: str = "auto"  # backend of each kernel; "auto": by target and shape
  matmul: str = "auto"
  elementwise: str = "auto"
  cross_entropy: str = "auto"
  unroll_layers: int | None = None  # layers per scan step; None: by target
