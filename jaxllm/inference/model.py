"""A loaded model: parameters, tokenizer and settings, with logits, generation and saving."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.data.tokenizers import Tokenizer, load_tokenizer
from jaxllm.errors import CheckpointError, ConfigError, DataError
from jaxllm.inference.generate import Completion, Delta, generate_tokens, stream_tokens
from jaxllm.inference.sampling import SamplingParams
from jaxllm.interop import model_directory
from jaxllm.kernels.backends import target_from_device_kind
from jaxllm.models.build import Params, declare, stack_layers, unstack_layers
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.objectives.causal_lm import causal_lm
from jaxllm.parallel.config import AxisRules
from jaxllm.parallel.sharding import param_shardings

DTYPES = ("float32", "bfloat16", "float16")
Prompt = str | Sequence[int]


class Model:
  """A language model that can be called, asked for text, and saved; its weights take `compute.dtype`.

  Attributes:
    config: what the model is. tokenizer: None if it has none; then prompts are token ids.
    graph: static; `nnx.merge(graph, params)` is the callable Transformer.
    generation: eos_token_id and default sampling settings, by Hugging Face's names.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    compute: Compute = Compute(),
    generation: dict[str, Any] | None = None,
  ):
    self.config, self.tokenizer, self.generation = config, tokenizer, dict(generation or {})
    self.graph = declare(config, compute)[0]
    self._weights = jax.tree.map(lambda w: w.astype(compute.dtype), unstack_layers(params))
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
      raise DataError(
        f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {config.vocab_size}; "
        "it belongs to another model"
      )

  @property
  def params(self) -> Params:
    """The parameters, layers stacked: a copy made at every call, since the model keeps each layer apart."""
    return stack_layers(self._weights)

  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """float32 logits of token ids.

    Raises:
      ConfigError: the tokens are not [B, T], too long, or not in the vocabulary.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
      raise ConfigError(f"a model takes integer tokens [B, T], not {ids.dtype} of shape {ids.shape}")
    if ids.shape[1] > self.config.max_seq_len:
      raise ConfigError(
        f"{ids.shape[1]} tokens: the sequence length is over the model's limit of {self.config.max_seq_len}"
      )
    if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
      raise ConfigError(f"token ids must be between 0 and {self.config.vocab_size - 1}")
    return _forward(self.graph)(self._weights, ids.astype(np.int32))

  def loss_sums(self, batch: dict[str, np.ndarray]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed loss in nats of a packed batch's targets, and the sum of their weights; for evaluation."""
    return _loss_sums(self.graph)(self._weights, batch)

  def generate(
    self,
    prompts: Prompt | Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    **settings,
  ) -> list[Completion]:
    """Completions of a prompt or of each of several (text, or token ids), as one batch.

    Args:
      sampling: how to draw, for all prompts or for each; by default `self.sampling(**settings)`.
      settings: fields of SamplingParams, in place of `sampling`.

    Raises:
      ConfigError: an empty or too long prompt, or an impossible setting.
    """
    return generate_tokens(*self._request(prompts, sampling, settings), **self._ends())

  def stream(
    self,
    prompts: Prompt | Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    steps: int = 1,
    **settings,
  ) -> Iterator[Delta]:
    """Like `generate`, as it happens: text and tokens of every row after each `steps` decode steps."""
    return stream_tokens(*self._request(prompts, sampling, settings), **self._ends(), steps=steps)

  def sampling(self, **settings) -> SamplingParams:
    """SamplingParams with the model's own defaults (from generation_config.json) and these settings."""
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    names["max_new_tokens"] = "max_tokens"
    own = {ours: self.generation[name] for name, ours in names.items() if self.generation.get(name) is not None}
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    if unknown := sorted(settings.keys() - known):
      raise ConfigError(f"no sampling setting {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return SamplingParams(**(own | settings))

  def encode(self, text: str) -> list[int]:
    """Token ids of a prompt, behind the token that starts a text where the tokenizer has one."""
    if self.tokenizer is None:
      raise ConfigError("the model has no tokenizer; give prompts as token ids")
    ids = [int(token) for token in self.tokenizer.encode(text)]
    if self.tokenizer.bos_id is not None:
      return [self.tokenizer.bos_id, *ids]
    return ids or [self.tokenizer.start_id]

  def save(self, path: str | Path) -> None:
    """Writes a model directory (see `jaxllm.interop.model_directory`).

    Raises:
      CheckpointError: the path holds something else, or cannot be written.
    """
    generation = {"eos_token_id": list(self._ends()["eos_ids"])} | self.generation
    model_directory.write_model(Path(path).expanduser(), self.config, self.params, self.tokenizer, generation)

  def _request(self, prompts, sampling, settings):
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))
    prompts = [prompts] if single else prompts
    if sampling is None:
      sampling = self.sampling(**settings)
    elif settings:
      raise ConfigError(f"give either SamplingParams or {', '.join(settings)}, not both")
    ids = [self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return self.graph, self._weights, self.config, ids, sampling

  def _ends(self):
    ends = self.generation.get("eos_token_id")
    if ends is None and self.tokenizer is not None:
      ends = self.tokenizer.eos_id
    ends = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    return {"tokenizer": self.tokenizer, "eos_ids": ends}


@functools.lru_cache(maxsize=8)
def _loss_sums(graph):
  return jax.jit(lambda weights, batch: causal_lm(nnx.merge(graph, weights), batch)[2]["nll"])


@functools.lru_cache(maxsize=8)
def _forward(graph):
  return jax.jit(lambda weights, tokens: nnx.merge(graph, weights)(tokens)[0])


def load_model(
  path: str | Path,
  *,
  step: int | None = None,
  dtype: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Model:
  """Loads a model directory, or a training run's directory (its latest checkpoint, or that of `step`).

  Args:
    dtype: of weights and computation, "float32", "bfloat16" or "float16"; None: as the weights are stored.
    mesh: places the parameters over its devices; None: the default device.

  Raises:
    CheckpointError: no such path, not a model, or damaged. ConfigError: an impossible `dtype` or `step`.
    DataError: the tokenizer is damaged, or has more tokens than the model.
  """
  directory = Path(path).expanduser()
  if not directory.exists():
    raise CheckpointError(f"no model at {directory}: there is no such path")
  if not directory.is_dir() or not (directory / model_directory.CONFIG_FILE).is_file():
    raise CheckpointError(
      f"{directory} is not a model: a model directory or a training run's directory has a {model_directory.CONFIG_FILE}"
    )
  if dtype is not None and dtype not in DTYPES:
    raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
  config = model_directory.read_model_config(directory)
  _, shapes, axes = declare(config)
  shardings = None if mesh is None else param_shardings(shapes, axes, mesh, AxisRules())
  is_run = (directory / "checkpoints").is_dir()
  if is_run:
    from jaxllm.training.checkpoints import restore_params

    _, params = restore_params(directory, _placed(shapes, shardings, dtype), step)
    tokenizer_files = directory / "tokenizer"
  elif step is not None:
    raise ConfigError(f"{directory} is a model directory and has no steps; leave --step out")
  else:
    params = model_directory.read_params(directory, shapes, shardings, dtype)
    tokenizer_files = directory
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  target = target_from_device_kind(device.platform, device.device_kind)
  compute = Compute(target=target, dtype=dtype or str(params["embedding"]["tokens"].dtype))
  return Model(
    config,
    params,
    _tokenizer(tokenizer_files),
    compute=compute,
    generation=model_directory.read_generation_config(directory),
  )


def _placed(shapes: Params, shardings: Params | None, dtype: str | None) -> Params:
  """What to restore: each parameter's shape, dtype and place."""
  leaf = lambda s, place=None: jax.ShapeDtypeStruct(s.shape, dtype or s.dtype, sharding=place)  # noqa: E731
  return jax.tree.map(leaf, shapes) if shardings is None else jax.tree.map(leaf, shapes, shardings)


def _tokenizer(directory: Path) -> Tokenizer | None:
  """The tokenizer in a directory; None where there are no files of one (a model of bare token ids)."""
  if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
    return None
  return load_tokenizer(directory)
