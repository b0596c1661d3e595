"""Direct preference optimization: the policy learns to prefer what was chosen, measured against where it began."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.base.errors import ConfigError
from jaxllm.base.ranges import Amount, Decay, Positive
from jaxllm.models.head import token_log_probs
from jaxllm.models.transformer import Transformer
from jaxllm.objectives.base import Batch, Loss, Objective

LossType = Literal["sigmoid", "hinge", "ipo", "robust"]


@dataclasses.dataclass(frozen=True)
class DPO(Objective):
  """Losses of a pair's log-ratios (Rafailov et al., arXiv 2305.18290, equation 7, and those that followed it).

  Batch: `chosen` and `rejected` rows; a row's log-probability is the sum over the tokens that have a loss weight. The
  reference is the policy as it began, which under adapters is the policy without them, or the model at `reference`;
  with `cache_reference` the batch brings what it says, `reference_logps` [B] of each side. Each pair weighs the same.
  With x the score of the chosen row less that of the rejected one:

  sigmoid: -log σ(β x), smoothed with `label_smoothing` e: -(1 - e) log σ(β x) - e log σ(-β x) (cDPO).
  hinge: max(0, 1 - β x) (SLiC, arXiv 2305.10425). ipo: (x - 1 / 2β)², scores per token (arXiv 2310.12036, as TRL has
  it). robust: the smoothed loss without the bias of flipped labels (arXiv 2403.00409).
  """

  name: ClassVar[str] = "dpo"
  architectures: ClassVar = ("decoder",)
  heads_and_tasks: ClassVar = (("lm", "preference"),)
  writes_text: ClassVar[bool] = True

  loss_type: LossType = "sigmoid"
  beta: Positive = 0.1
  label_smoothing: Decay = 0.0  # share of the pairs that are thought to be the wrong way round
  length_normalized: bool = False  # scores per token and not per row
  sft_weight: Amount = 0.0  # of the chosen rows' mean loss per token, added (RPO, arXiv 2404.19733)
  reference: str = ""  # of a model in files; "": the policy as it began
  reference_free: bool = False  # a reference for which all rows are equally likely
  cache_reference: bool = False  # its log-probabilities once, on disk; then it is neither in memory nor computed again

  def __post_init__(self):
    if self.beta <= 0:
      raise ConfigError(f"objective.beta is {self.beta}; it must be over 0")
    limit = 0.5 if self.loss_type == "robust" else 1.0
    if not 0 <= self.label_smoothing < limit:
      raise ConfigError(f"objective.label_smoothing is {self.label_smoothing}; it must be at least 0, below {limit}")
    if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
      raise ConfigError(f"objective.label_smoothing is for 'sigmoid' and 'robust', not for {self.loss_type!r}")
    for name in ("reference", "cache_reference"):
      if self.reference_free and getattr(self, name):
        raise ConfigError(f"objective.{name} is set, and objective.reference_free too, which has no reference")

  @property
  def others(self) -> tuple[str, ...]:  # type: ignore[override]
    return () if self.reference_free or self.cache_reference else ("reference",)

  @property
  def cached(self) -> str:  # type: ignore[override]
    return "reference" if self.cache_reference else ""

  @property
  def uncached(self) -> "DPO":
    return dataclasses.replace(self, cache_reference=False)

  def row(self, data, seq_len):
    row = super().row(data, seq_len)
    if not self.cache_reference:
      return row
    return {side: entries | {"reference_logps": np.zeros((), np.float32)} for side, entries in row.items()}

  def scores(self, model, batch):
    logps = _row_log_probs(model, _side_by_side(batch))[0]
    return {side: {"reference_logps": logps[:, i]} for i, side in enumerate(("chosen", "rejected"))}

  def __call__(self, models, batch, key=None) -> Loss:
    rows = _side_by_side(batch)
    logps, tokens, logits = _row_log_probs(models["policy"], rows)
    lengths = jnp.maximum(tokens, 1)
    reference = jnp.zeros_like(logps)
    if self.cache_reference:
      reference = rows["reference_logps"].reshape(-1, 2)
    elif not self.reference_free:
      reference = jax.lax.stop_gradient(_row_log_probs(models["reference"], rows)[0])
    gains = logps - reference  # [B, 2]
    scores = gains / lengths if self.length_normalized or self.loss_type == "ipo" else gains
    losses = self._losses(scores[:, 0] - scores[:, 1])
    if self.sft_weight:
      losses += self.sft_weight * -logps[:, 0] / lengths[:, 0]
    real = (tokens > 0).all(1).astype(jnp.float32)  # not the empty pairs that fill a last batch
    pairs = real.sum()
    rewards = self.beta * gains
    margins = rewards[:, 0] - rewards[:, 1]
    figures = {
      "rewards/chosen": rewards[:, 0],
      "rewards/rejected": rewards[:, 1],
      "rewards/accuracies": (margins > 0).astype(jnp.float32),
      "rewards/margins": margins,
      "logps/chosen": logps[:, 0],
      "logps/rejected": logps[:, 1],
      "pair_loss": losses,
    }
    metrics = {name: ((real * values).sum(), pairs) for name, values in figures.items()}
    for side, name in enumerate(("logits/chosen", "logits/rejected")):  # of a token, where the others are of a pair
      metrics[name] = logits[:, side].sum(), tokens[:, side].sum()
    return Loss((real * losses).sum(), pairs, metrics)

  def _losses(self, x: Float[Array, " B"]) -> Float[Array, " B"]:
    beta, e = self.beta, self.label_smoothing
    if self.loss_type == "hinge":
      return jax.nn.relu(1 - beta * x)
    if self.loss_type == "ipo":
      return jnp.square(x - 1 / (2 * beta))
    right, wrong = -jax.nn.log_sigmoid(beta * x), -jax.nn.log_sigmoid(-beta * x)
    if self.loss_type == "robust":
      return ((1 - e) * right - e * wrong) / (1 - 2 * e)
    return (1 - e) * right + e * wrong

  def figures(self, totals, text_bytes=None):
    figures = super().figures(totals, text_bytes)
    return figures | {"loss": figures.pop("pair_loss")}


def _side_by_side(batch: Batch) -> Batch:
  """One batch [2B, T] of both rows of every pair, each pair together: so one forward pass, and nothing moves between
  the devices of a mesh."""
  return jax.tree.map(
    lambda chosen, rejected: jnp.stack([chosen, rejected], 1).reshape(-1, *chosen.shape[1:]),
    batch["chosen"],
    batch["rejected"],
  )


def _row_log_probs(
  model: Transformer, rows: Batch
) -> tuple[Float[Array, "B 2"], Float[Array, "B 2"], Float[Array, "B 2"]]:
  """The log-probability of each row's weighted tokens, how many there are, and the sum of their mean logits."""
  hidden, _ = model.hidden(rows["inputs"], positions=rows["positions"], segment_ids=rows["segment_ids"])
  mask = rows["loss_weights"] > 0
  logps = token_log_probs(model, hidden, rows["targets"], mask)
  logits = jnp.where(mask, jax.lax.stop_gradient(model.mean_logits(hidden)), 0).sum(-1)
  tokens = mask.sum(-1).astype(jnp.float32)
  return tuple(x.reshape(-1, 2) for x in (logps.sum(-1), tokens, logits))  # type: ignore[return-value]
