"""Settings of a training run: steps, optimizer, logging, profiling."""

import dataclasses
from typing import Any, Literal

from jaxllm.base.errors import ConfigError
from jaxllm.base.ranges import Amount, Count, Decay, Positive, Seed, Share, Size
from jaxllm.data.config import DataConfig
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.objectives.causal_lm import CausalLM
from jaxllm.objectives.registry import AnyObjective
from jaxllm.parallel.config import MeshConfig
from jaxllm.peft.base import Full
from jaxllm.peft.registry import AnyPeft
from jaxllm.storage.config import CheckpointConfig, higher_is_better


@dataclasses.dataclass(frozen=True)
class EarlyStoppingConfig:
  """When a run ends before its last step, because a held-out figure gets no better (`training.watch`)."""

  patience: Count = 0  # evaluations without an improvement after which it ends; 0: never
  metric: str = "eval/loss"  # of metrics.jsonl: "eval/rewards/accuracies", "replay/loss"
  min_delta: Amount = 0.0  # an improvement is more than this
  mode: Literal["auto", "min", "max"] = "auto"  # which is better; "auto": by the metric's name

  def __post_init__(self):
    if self.patience and self.mode == "auto" and higher_is_better(self.metric) is None:
      raise ConfigError(
        f"training.early_stopping.metric is {self.metric!r}, of which it is not known whether more is better: set "
        "training.early_stopping.mode to 'min' or 'max'"
      )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  steps: Size = 1000
  batch_size: Size = 8  # sequences per optimizer step, over all hosts
  seq_len: Size = 256
  accumulation: Size = 1  # micro-batches per optimizer step
  seed: Seed = 0
  neftune_alpha: Amount = 0.0  # noise on the embeddings of a training step (`jaxllm.models.noise`); 0: none
  ema_decay: Decay | None = None  # keep an exponential moving average of the weights
  on_bad_step: Literal["stop", "skip"] = "stop"  # NaN, Inf or a loss spike
  spike_sigmas: Positive | None = None  # a loss this many standard deviations above its running mean is bad
  eval_every: Count = 0  # 0: only at the end
  eval_batches: Count = 0  # 0: the whole held-out set
  early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
  # A prepared data directory whose held-out split is measured at step 0 and at each evaluation: what the run forgets
  replay_dir: str = ""
  replay_limit: Amount | None = None  # nats that the loss on it may rise
  on_forgetting: Literal["stop", "warn"] = "stop"  # where it rises by more
  sample_every: Count = 0  # 0: only at the end
  sample_prompts: tuple[str, ...] = ("",)
  sample_tokens: Size = 128
  sample_temperature: Amount = 0.8

  def __post_init__(self):
    if self.early_stopping.patience and not self.eval_every:
      raise ConfigError("training.early_stopping.patience counts evaluations; set training.eval_every")
    if self.replay_limit is not None and not self.replay_dir:
      raise ConfigError("training.replay_limit is set, but training.replay_dir is not: there is nothing to measure")
    if self.batch_size % self.accumulation:
      raise ConfigError(
        f"training.batch_size {self.batch_size} is not divisible by training.accumulation {self.accumulation}"
      )


@dataclasses.dataclass(frozen=True)
class ParamRule:
  """Applies to every parameter whose path (like "blocks/attention/query") matches the regex `pattern`."""

  pattern: str = ".*"
  lr_scale: Amount = 1.0  # 0 freezes the parameter
  weight_decay: Amount | None = None  # None: the optimizer's


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
  learning_rate: Amount = 3e-4  # peak
  schedule: Literal["cosine", "wsd", "linear", "constant", "rsqrt"] = "cosine"
  warmup_steps: Count = 100
  decay_fraction: Share = 0.2  # wsd: share of the steps spent decaying
  final_lr_fraction: Share = 0.1  # of the peak, at the last step (rsqrt and constant have none)
  b1: Decay = 0.9
  b2: Decay = 0.95
  eps: Amount = 1e-8
  weight_decay: Amount = 0.1
  # By default norms, biases and embeddings do not decay; rules come first, the first match wins.
  rules: tuple[ParamRule, ...] = ()
  clip_norm: Positive | None = 1.0  # global gradient norm; None: no clipping
  muon_learning_rate: Amount = 0.02  # of the matrices; the rest takes adamw at learning_rate
  muon_momentum: Decay = 0.95
  loss_scale: Positive = 2.0**15  # float16 only: where dynamic loss scaling starts
  loss_scale_growth_steps: Size = 2000


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
  every: Size = 10  # steps between lines of metrics.jsonl
  tensorboard: bool = True
  wandb: bool = False
  wandb_project: str = "jaxllm"
  wandb_mode: Literal["online", "offline"] = "online"
  mlflow: bool = False
  mlflow_uri: str = ""  # "": sqlite file mlflow.db in the run directory
  mlflow_experiment: str = "jaxllm"


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  steps: Count = 0  # trace so many steps into <run>/profile
  start: Count = 10  # the first of them, counted from the start of this process


@dataclasses.dataclass(frozen=True)
class ModelInitConfig:
  """What the weights are before the first step; without a path they are fresh, drawn from training.seed."""

  path: str = ""  # a model in any form that jaxllm.load_model reads; its config is the model group's default
  adapter: str = ""  # of a PEFT LoRA adapter that is merged into it
  step: Count | None = None  # of a training run; None: the latest
  quantize: Literal["int8", "int4", "nf4", "fp8"] | None = None  # the layers' matrices, which are frozen then
  group_size: Size | None = 64  # weights that share a scale; None: those of an output feature
  double_quantize: bool = False  # the scales in 8 bits too, in blocks of 256 (QLoRA, arXiv 2305.14314)
  new_tokens: tuple[str, ...] = ()  # the tokenizer and the vocabulary have these too; they begin as the mean token

  def __post_init__(self):
    if self.double_quantize and self.quantize is None:
      raise ConfigError("model_init.double_quantize is set, but model_init.quantize is not: there are no scales")
    for name in ("adapter", "step", "new_tokens"):
      if getattr(self, name) and not self.path:
        raise ConfigError(f"model_init.{name} is set, but model_init.path is not: there is no model that it belongs to")


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Everything a job needs to know, one field per config group."""

  model: ModelConfig = ModelConfig()
  model_init: ModelInitConfig = ModelInitConfig()
  peft: AnyPeft = Full()
  data: DataConfig = DataConfig()
  objective: AnyObjective = CausalLM()
  compute: ComputeConfig = ComputeConfig()
  training: TrainingConfig = TrainingConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  logging: LoggingConfig = LoggingConfig()
  profile: ProfileConfig = ProfileConfig()

  def __post_init__(self):
    if not self.model_init.path:  # else the model is known when that is open
      if getattr(self.peft, "path", ""):
        raise ConfigError("peft.path is set, but model_init.path is not: there is no model that the adapter belongs to")
      self.check()

  def check(self) -> None:
    """That the groups fit together. Raises ConfigError, naming a key."""
    model, training = self.model, self.training
    if training.seq_len > model.max_seq_len:
      raise ConfigError(
        f"training.seq_len {training.seq_len} is over the model's limit model.max_seq_len "
        f"{model.max_seq_len}; lower the first or raise the second"
      )
    tokenizer = self.data.tokenizer
    if not tokenizer.path and tokenizer.vocab_size > model.vocab_size:
      raise ConfigError(
        f"data.tokenizer.vocab_size {tokenizer.vocab_size} is over model.vocab_size {model.vocab_size}; "
        "the model needs a row for every token"
      )
    self.objective.check(model, self.data)
    if self.data.target_len > model.max_seq_len:
      raise ConfigError(f"data.target_len {self.data.target_len} is over model.max_seq_len {model.max_seq_len}")
    for key in ("mask_id", "sentinel_id"):
      if (getattr(self.data.corruption, key) or 0) >= model.vocab_size:
        raise ConfigError(
          f"data.corruption.{key} {getattr(self.data.corruption, key)} is not below model.vocab_size {model.vocab_size}"
        )


# Keys that stood in another group in earlier versions. A config may not use them any more; saved runs have them.
MOVED = {"training.z_loss": "objective.z_loss"} | {
  f"training.{field.name}": f"compute.{field.name}" for field in dataclasses.fields(ComputeConfig)
}


def moved(tree: Any) -> Any:
  """The nested dicts of a saved run's config with the keys of earlier versions at their places of today."""
  for old, new in MOVED.items():
    (group, key), (now, name) = old.split("."), new.split(".")
    if isinstance(tree, dict) and isinstance(tree.get(group), dict) and key in tree[group]:
      into = tree.setdefault(now, {})
      if not isinstance(into, dict):
        raise ConfigError(f"config {now} is {into!r}; it should be a group of keys")
      into[name] = tree[group].pop(key)
  return tree
