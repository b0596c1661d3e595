"""What a model is (`ModelConfig`), and how it is to be computed (`Compute`)."""

import dataclasses
import math
from typing import Annotated, Literal

from jaxllm.base import ranges
from jaxllm.base.errors import ConfigError
from jaxllm.base.ranges import Amount, Count, Positive, Range, Share, Size
from jaxllm.models.parts import (
  AdapterConfig,
  Heads,
  HeadsOr0,
  Layers,
  LayersOr0,
  MLAConfig,
  MoEConfig,
  RopeScaling,
  Width,
  WidthOr0,
)

# Each may stand alone ("mish") or be gated: "gated_mish", or by its own name where it has one; `jaxllm.models.mlp`.
ACTIVATIONS = (
  *("silu", "gelu", "gelu_tanh", "quick_gelu", "gelu_10", "relu", "relu2", "relu6", "leaky_relu", "mish", "tanh"),
  *("sigmoid", "hardswish", "laplace", "linear"),
)
_OWN_NAMES = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
GATED = {name: _OWN_NAMES.get(name, f"gated_{name}") for name in ACTIVATIONS} | {"silu_clamped": "swiglu_clamped"}
# `ModelConfig.mlp` -> (activation, gated)
MLPS = {gated: (name, True) for name, gated in GATED.items()} | {name: (name, False) for name in ACTIVATIONS}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A Transformer, as orthogonal choices; a model family is a preset of these.

  Zero in `num_kv_heads`, `head_dim` or `mlp_dim` means the usual value: `num_heads`,
  `embed_dim / num_heads`, and 4 x embed_dim (gated: 8/3 x, rounded up to a multiple of 64).
  """

  vocab_size: Annotated[int, Range(1, 2**28)] = 32000
  embed_dim: Width = 512
  num_layers: Layers = 8
  num_heads: Heads = 8
  num_kv_heads: HeadsOr0 = 0
  head_dim: HeadsOr0 = 0
  mlp_dim: WidthOr0 = 0
  max_seq_len: Size = 2048  # tokens that it is made for; see `has_length_limit`

  # decoder: a token sees those before it. encoder: it sees all. encoder_decoder: a decoder that also attends
  # to an encoder's states; both read the same token vectors.
  architecture: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"
  num_encoder_layers: LayersOr0 = 0  # of an encoder_decoder; 0: num_layers
  decoder_start_id: Count = 0  # the token before an encoder_decoder's first one

  # Attention
  attention_bias: bool = False  # on query, key and value
  attention_out_bias: bool = False
  # head: one norm for every head (Qwen3); heads: each head has its own (Cohere); full: over all heads (OLMo 2)
  qk_norm: Literal["none", "head", "heads", "full"] = "none"
  qkv_clip: Positive | None = None  # queries, keys and values are kept within it (OLMo 1)
  query_scale: Positive | None = None  # None: head_dim ** -0.5
  attention_softcap: Positive | None = None
  sliding_window: Size | None = None  # a query sees this many keys, itself included
  # Repeats; (): local if there is a window. nope: global, and not rotated (SmolLM3).
  layer_pattern: tuple[Literal["global", "local", "nope"], ...] = ()
  mla: MLAConfig | None = None  # then head_dim is its nope_head_dim + rope_head_dim
  attention_sinks: bool = False  # a learned logit per head that takes probability and gives no value
  sink_tokens: Count = 0  # the first tokens of a segment stay visible past the window (arXiv 2309.17453)

  # Positions
  position: Literal["rope", "learned", "sinusoidal", "alibi", "relative", "none"] = "rope"
  position_offset: Count = 0  # learned, sinusoidal: the row of position 0 (RoBERTa, BART, M2M-100)
  # learned, sinusoidal: tokens with this id are not counted, and stand at position -1 (RoBERTa, M2M-100)
  position_pad_id: Count | None = None
  sinusoidal_theta: Positive = 10000.0  # sinusoidal: its slowest wave has this wavelength over 2 pi
  alibi_scale: Positive = 1.0  # of the slopes (Falcon: head_dim ** -0.5)
  # Beside positions of another kind. learned: as with "relative" ones (MPNet). disentangled: of an encoder, products of
  # each query and key with vectors of distances, of which there are 2 relative_buckets (DeBERTa, arXiv 2006.03654).
  relative_bias: Literal["none", "learned", "disentangled"] = "none"
  relative_buckets: Width = 32  # relative: a learned bias per head and bucket of distances (T5, arXiv 1910.10683)
  relative_max_distance: Size = 128  # from which on all distances share the last bucket
  rope_theta: Positive = 10000.0
  rope_local_theta: Positive | None = None  # of the local layers; None: rope_theta
  rope_fraction: Share = 1.0  # of head_dim that is rotated
  rope_scaling: RopeScaling | None = None  # of the global layers

  # Norms
  norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
  norm_eps: Share = 1e-5
  norm_bias: bool = True  # LayerNorm only
  norm_affine: bool = True  # False: norms have neither a scale nor a bias (OLMo 1)
  norm_unit_offset: bool = False  # weight w stands for the scale 1 + w (Gemma)
  # pre: x + f(norm(x)); post: norm(x + f(x)); sandwich: x + norm(f(norm(x))); output: x + norm(f(x))
  norm_placement: Literal["pre", "post", "sandwich", "output"] = "pre"
  parallel_residual: bool = False  # x + attention(norm(x)) + mlp(norm'(x)) (GPT-NeoX)
  shared_norm: bool = False  # and norm' is norm (GPT-J, Cohere)
  residual_scale: Positive | None = None  # of what a part adds to the residual stream (Granite)
  embedding_norm: bool = False
  final_norm: bool = True
  first_norm: bool = True  # False: the first layer's attention reads the embedding as it is (ModernBERT)
  # Of an encoder: so many neighbouring vectors of the embedding are put through a matrix and an activation and join
  # what the first layer makes of them, before another norm (DeBERTa v2 xlarge). 0: none; else odd.
  convolution_size: WidthOr0 = 0
  convolution_activation: str = "tanh"

  # Feed-forward
  mlp: str = "swiglu"
  mlp_bias: bool = False
  moe: MoEConfig | None = None

  # Embedding
  tie_embeddings: bool = True
  num_token_types: WidthOr0 = 0  # kinds of segment that a token's vector tells apart (BERT)
  embedding_scale: Positive | None = None  # Gemma: embed_dim ** 0.5
  embedding_dim: WidthOr0 = 0  # of the embedding, which is then projected to embed_dim; 0: embed_dim
  # sum: with a bias, the sum of what stands for tokens, segments and positions (ELECTRA). tokens: without one, tokens'
  # vectors, before anything is added to them (OPT-350m).
  embedding_projection: Literal["sum", "tokens"] = "sum"

  # Head. lm: logits over the vocabulary. sequence, token: num_labels logits of a text, or of each token. span: of
  # each token two logits, that an answer starts there and that it ends there.
  head: Literal["lm", "sequence", "token", "span", "none"] = "lm"
  num_labels: WidthOr0 = 0
  head_bias: bool = False
  # Activation of a dense layer before the head: "gelu" in masked language models, "tanh" in BERT's pooler.
  head_dense: str | None = None
  head_dense_bias: bool | None = None  # None: where mlp_bias is set, but for "linear"
  head_norm: bool = False  # and a norm after it
  pooling: Literal["first", "mean", "last"] = "first"  # which hidden state stands for a text
  logit_scale: Positive | None = None  # T5 with a tied head: embed_dim ** -0.5
  logit_softcap: Positive | None = None

  adapter: AdapterConfig | None = None

  # Initialisation of the matrices. normal: std init_std (BERT, OPT). gpt2: also divides the std of the
  # two projections into the residual stream by sqrt(2 L) (GPT-2 report, section 2.3; Llama trainings do
  # the same). fan_in: std 1/sqrt(inputs) (T5, PaLM). small: SmallInit sqrt(2 / 5D), residual projections
  # 2 / (L sqrt(D)) (GPT-NeoX-20B, arXiv 2204.06745).
  init: Literal["normal", "gpt2", "fan_in", "small"] = "gpt2"
  init_std: Amount = 0.02

  def __post_init__(self):
    def put(name, value):
      object.__setattr__(self, name, value)

    def fill(name, value):
      if not getattr(self, name):
        put(name, value)

    ranges.check(ModelConfig, vars(self), "model")
    if self.mlp not in MLPS:
      raise ConfigError(f"model.mlp is {self.mlp!r}; choose one of {', '.join(MLPS)}")
    for name in ("head_dense", "convolution_activation"):
      if (activation := getattr(self, name)) not in (None, *ACTIVATIONS):
        raise ConfigError(f"model.{name} is {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if self.head_dense_bias == self._usual_dense_bias or self.head_dense is None:
      put("head_dense_bias", None)
    if self.convolution_size and (self.architecture != "encoder" or self.convolution_size % 2 == 0):
      raise ConfigError("model.convolution_size is an odd number, and for model.architecture 'encoder'")
    fill("num_kv_heads", self.num_heads)
    if self.head == "span":
      fill("num_labels", 2)
    if self.architecture == "encoder_decoder":
      fill("num_encoder_layers", self.num_layers)
      if self.parallel_residual or self.qk_norm != "none" or self.attention_sinks or self.qkv_clip:
        raise ConfigError(
          "cross-attention goes with neither model.parallel_residual, qk_norm, attention_sinks nor qkv_clip"
        )
    elif self.num_encoder_layers:
      raise ConfigError(f"model.num_encoder_layers is of an encoder_decoder; this is a model of {self.architecture!r}")
    if self.token_dim != self.embed_dim and (
      self.architecture == "encoder_decoder" or self.head == "lm" and not self.head_dense
    ):
      raise ConfigError("model.embedding_dim other than embed_dim needs model.head_dense, and no encoder_decoder")
    if self.head in ("sequence", "token", "span") and self.num_labels < 1:
      raise ConfigError(f"model.head {self.head!r} needs model.num_labels of at least 1, not {self.num_labels}")
    if (self.moe or self.mla) and (self.architecture != "decoder" or not self.first_norm):
      raise ConfigError("model.moe and model.mla are for model.architecture 'decoder' with model.first_norm")
    if self.adapter is not None and self.adapter.prefix_len and (self.mla or self.architecture != "decoder"):
      raise ConfigError("model.adapter.prefix_len is for model.architecture 'decoder' without model.mla")
    if self.mla is not None:
      self._check_mla()
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
    for kind in self.layer_pattern:
      if kind not in ("global", "local", "nope"):
        raise ConfigError(f"model.layer_pattern holds {kind!r}; each entry is 'global', 'local' or 'nope'")
    if self.moe is not None:
      if self.mlp_bias:
        raise ConfigError("experts have no biases: set model.mlp_bias to False, or model.moe to None")
      if not self.moe_layers:
        raise ConfigError("model.moe leaves no layer with experts; change its first_dense_layers or every")
      put("moe", dataclasses.replace(self.moe, mlp_dim=self.moe.mlp_dim or self.mlp_dim))
    if self.relative_bias == "disentangled" and (self.architecture != "encoder" or self.num_kv_heads != self.num_heads):
      raise ConfigError(
        "model.relative_bias 'disentangled' is for model.architecture 'encoder', with one key head each"
      )
    if self.shared_norm and not self.parallel_residual:
      raise ConfigError("model.shared_norm is for model.parallel_residual")
    if self.parallel_residual and self.norm_placement != "pre":
      raise ConfigError(f"model.parallel_residual needs model.norm_placement 'pre', not {self.norm_placement!r}")
    scaling = self.rope_scaling
    for name in ("short_factors", "long_factors") if scaling and scaling.kind == "longrope" else ():
      if len(factors := getattr(scaling, name)) != self.rotary_dim // 2:
        raise ConfigError(f"there are {self.rotary_dim // 2} rotated pairs of a head, but {len(factors)} {name}")
    if scaling and scaling.kind not in ("linear", "ntk") and not scaling.original_max_seq_len:
      raise ConfigError(f"model.rope_scaling.original_max_seq_len must be set for {scaling.kind} scaling")

  def _check_mla(self):
    width = self.mla.nope_head_dim + self.mla.rope_head_dim
    if self.head_dim not in (0, width):
      raise ConfigError(f"model.head_dim is {self.head_dim}, but model.mla makes heads of {width}; leave it 0")
    object.__setattr__(self, "head_dim", width)
    if self.num_kv_heads != self.num_heads or self.position != "rope" or self.qk_norm != "none":
      raise ConfigError("model.mla has as many key as query heads, RoPE and no qk_norm; change those or drop it")
    if self.attention_softcap or self.qkv_clip or self.attention_sinks or self.sliding_window or self.layer_pattern:
      raise ConfigError("model.mla goes with neither a soft-cap, qkv_clip, sinks, a window nor a layer_pattern")

  @property
  def _usual_dense_bias(self) -> bool:
    return self.mlp_bias and self.head_dense != "linear"

  @property
  def has_dense_bias(self) -> bool:
    """Whether the dense layer before the head has a bias."""
    return self._usual_dense_bias if self.head_dense_bias is None else self.head_dense_bias

  @property
  def rotary_dim(self) -> int:
    return self.mla.rope_head_dim if self.mla else int(self.head_dim * self.rope_fraction)

  @property
  def has_relative_bias(self) -> bool:
    return self.relative_bias != "none" or self.position == "relative"

  @property
  def has_length_limit(self) -> bool:
    """Whether a text has at most max_seq_len tokens: where only distances count, it may have any number."""
    return self.position not in ("alibi", "relative", "none")

  @property
  def rope_switch(self) -> int | None:
    """Tokens of the longest text that RoPE does not stretch, where it goes by the text's length and there are longer
    ones: a token's rotation then hangs on how long its text is."""
    s = self.rope_scaling if self.position == "rope" else None
    by_length = s is not None and s.kind in ("dynamic", "longrope") and self.max_seq_len > s.original_max_seq_len
    return s.original_max_seq_len if s is not None and by_length else None

  @property
  def token_dim(self) -> int:
    """Of the embedding's vectors."""
    return self.embedding_dim or self.embed_dim

  @property
  def head_input_dim(self) -> int:
    """Of what the head's matrix multiplies."""
    return self.token_dim if self.head == "lm" or self.head_dense == "linear" else self.embed_dim

  @property
  def encoder(self) -> "ModelConfig":
    """Of an encoder_decoder: its encoder, as a model of its own that has no head."""
    return dataclasses.replace(
      self,
      architecture="encoder",
      num_layers=self.num_encoder_layers,
      num_encoder_layers=0,
      head="none",
      head_bias=False,
      head_dense=None,
      head_norm=False,
    )

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """The repeating group of layer kinds."""
    return tuple(self.layer_pattern) or ("global" if self.sliding_window is None else "local",)

  @property
  def moe_layers(self) -> tuple[int, ...]:
    """The layers that have experts."""
    if self.moe is None:
      return ()
    return tuple(i for i in range(self.moe.first_dense_layers, self.num_layers) if (i + 1) % self.moe.every == 0)

  def layers_with(self, part: str) -> tuple[int, ...]:
    """The layers that have this part of a block: "mlp" or "moe" may be in some only, the others are in all."""
    sparse, layers = self.moe_layers, range(self.num_layers)
    return tuple(i for i in layers if part not in ("mlp", "moe") or (i in sparse) == (part == "moe"))

  @property
  def layer_runs(self) -> tuple[tuple[int, int, int], ...]:
    """Runs of layers that repeat: (first layer, layer after the last, period: the scan's stride)."""
    kinds = len(self.layer_kinds)
    first = self.moe.first_dense_layers if self.moe else 0
    like = self.first_norm and not self.convolution_size  # whether the first layer is like the others
    first = min(first if like else kinds, self.num_layers)
    period = math.lcm(kinds, self.moe.every) if self.moe else kinds
    runs = (0, first, kinds), (first, self.num_layers, period)
    return tuple(run for run in runs if run[0] < run[1])


OPS = (
  "attention",
  "matmul",
  "elementwise",
  "cross_entropy",
  "grouped_matmul",
  "quantized_matmul",
)  # whose backends `Compute` names


@dataclasses.dataclass(frozen=True)
class Compute:
  """How a model is computed; nothing here changes what it is, and none of it is saved with it.

  `target` is the chip the program is for ("cpu", "h100", "v5p", …), so that a laptop can compile for a
  pod; the kernels choose their backends from it (see `jaxllm.kernels.backends`). `kernels` chooses for every op that
  is left at "auto": "pallas" our Pallas kernels of the target's family, where they can compute the call, "xla" the
  plain form. Raises ConfigError where there is no Pallas kernel for the target.

  `batch_invariant` gives every op the backend "cpu_invariant": a token's result is the same to the bit whatever else is
  computed beside it, with a cache as without (docs/engine.md). Raises ConfigError where the target has no such backend
  or an op's is named.
  """

  target: str = "cpu"
  dtype: str = "float32"  # of activations and of the weights as multiplied; master weights stay float32
  reduce_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of gradients' sums; else that of compute
  remat: Literal["none", "full", "dots", "offload", "names"] = "none"
  remat_names: tuple[str, ...] = ()  # for remat="names": the checkpoint names to keep
  kernels: Literal["auto", "pallas", "xla"] = "auto"
  attention: str = "auto"  # backend of each kernel; "auto": as `kernels` says, by target, shape and what was measured
  matmul: str = "auto"
  elementwise: str = "auto"
  cross_entropy: str = "auto"
  grouped_matmul: str = "auto"  # of the experts
  quantized_matmul: str = "auto"
  unroll_layers: Count | None = None  # layers per scan step; None: by target
  batch_invariant: bool = False

  def __post_init__(self):
    if self.reduce_dtype not in ("float32", self.dtype):
      raise ConfigError(
        f"compute.reduce_dtype is {self.reduce_dtype!r} and compute.dtype {self.dtype!r}; gradients are summed in "
        "'float32' or in compute.dtype"
      )
    if self.kernels == "pallas":
      from jaxllm.kernels.backends import check_pallas  # imports jax, which reading a config does without

      check_pallas(self.target)
    kernels: str = self.kernels
    if self.batch_invariant:
      kernels = self._invariant()
    for op in OPS:
      if getattr(self, op) == "auto":
        object.__setattr__(self, op, kernels)

  def _invariant(self) -> str:
    """The backend of the batch-invariant mode; that nothing stands against it."""
    from jaxllm.kernels.backends import INVARIANT, check_invariant  # imports jax

    check_invariant(self.target, self.dtype)
    for name in ("kernels", *OPS):
      if (asked := getattr(self, name)) not in ("auto", INVARIANT):
        raise ConfigError(f"compute.{name} is {asked!r}, which is not batch-invariant; leave it at 'auto'")
    return INVARIANT

  def backend(self, op: str) -> str:
    """What computes `op` where its operands do not matter; see `jaxllm.kernels.backends.choose`."""
    from jaxllm.kernels.backends import choose  # imports jax, which reading a config does without

    return choose(op, getattr(self, op), self.target)


def check_batch_invariant(model: ModelConfig) -> None:
  """That a model can be computed with `Compute.batch_invariant`.

  Raises:
    ConfigError: it has a part whose sums depend on what stands beside it, or differ with a cache and without.
  """
  parts = {
    f"architecture {model.architecture!r}": model.architecture != "decoder",
    "moe": model.moe is not None,
    "mla": model.mla is not None,
    "attention_sinks": model.attention_sinks,
    "sink_tokens": model.sink_tokens > 0,
    "a relative bias": model.has_relative_bias,
    "head_bias": model.head_bias,
    "residual_scale": model.residual_scale is not None,
    "qk_norm 'heads'": model.qk_norm == "heads",
    "adapter.prefix_len": model.adapter is not None and model.adapter.prefix_len > 0,
    f"head_dim {model.head_dim}, which is no multiple of 16,": model.head_dim % 16 > 0,
  }
  if unable := [name for name, has in parts.items() if has]:
    raise ConfigError(f"compute.batch_invariant is not for a model with {', '.join(unable)}")


@dataclasses.dataclass(frozen=True)
class ComputeConfig(Compute):
  """`Compute` as a config has it: what is "auto" is settled when the devices are known.

  dtype "auto": bfloat16 where the chip is known to multiply it in hardware of its own (TPUs, the GPUs of
  `jaxllm.base.chips`, one CPU device with AMX), else float32.
  """

  target: str = "auto"  # the chip of the mesh's devices
  dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"

  def __post_init__(self):
    pass  # settled later, and checked then

  def on(self, target: str, devices: int) -> Compute:
    """How `devices` chips compute, each of them a `target` unless the config names another.

    Raises:
      ConfigError: it asks for kernels that the target has not, or for sums in a dtype that is not computed in.
    """
    from jaxllm.kernels.backends import has_bfloat16  # imports jax, which reading a config does without

    target = target if self.target == "auto" else self.target
    # The CPU's own kernels are calls that the compiler cannot split over devices.
    split_cpu = target == "cpu" and devices > 1
    if split_cpu and self.batch_invariant:
      raise ConfigError(f"compute.batch_invariant is for one CPU device, not {devices}")
    dtype: str = self.dtype
    if dtype == "auto":
      dtype = "bfloat16" if has_bfloat16(target) and not split_cpu else "float32"
    kernels = "xla" if split_cpu and self.kernels == "auto" else self.kernels
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Compute)}
    return Compute(**fields | {"target": target, "dtype": dtype, "kernels": kernels})
