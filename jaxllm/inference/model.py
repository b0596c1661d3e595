"""A loaded model: parameters, tokenizer and settings, with logits, generation and saving."""

import dataclasses
import functools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from jaxllm.base.errors import ConfigError, DataError
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.inference.completions import Completion, Delta
from jaxllm.inference.encode import Pooling, embeddings, hidden_states
from jaxllm.inference.generate import Generator
from jaxllm.inference.generation_config import default_sampling, default_settings
from jaxllm.inference.params import SamplingParams
from jaxllm.inference.prompts import check_text, longest_text
from jaxllm.interop.sentence_transformers import TextVectors
from jaxllm.interop.stored import StoredModel, tensors_of
from jaxllm.interop.write import Format, write_model
from jaxllm.models.build import Params, declare, stack_layers, unstack_layers
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.quantization import quantize_matrix, quantize_table
from jaxllm.models.weights import cast, map_weights_with_path
from jaxllm.objectives.causal_lm import CausalLM

log = logging.getLogger("jaxllm")

Prompt = str | Sequence[int]
Message = dict[str, Any]


class Model:
  """A language model that can be called, asked for text, and saved; its weights take `compute.dtype`.

  Attributes:
    config: what the model is. tokenizer: None if it has none; then prompts are token ids.
    compute: how it computes. graph: static; `nnx.merge(graph, params)` is the callable Transformer.
    generation: eos_token_id and default sampling settings, by Hugging Face's names.
    source: what `StoredModel.source` is.
    vectors: how `embed` makes one vector of a text, unless it is told.
  """

  def __init__(
    self,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    compute: Compute = Compute(),
    generation: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    vectors: TextVectors | None = None,
  ):
    self.tokenizer, self.generation = tokenizer, dict(generation or {})
    start = self.generation.get("decoder_start_token_id")
    if config.architecture == "encoder_decoder" and start is not None:  # a text may begin as none did in training
      config = dataclasses.replace(config, decoder_start_id=start)
    self.config, self.compute, self.vectors = config, compute, vectors
    self.source = source or {}
    self.graph = declare(config, compute)[0]
    self._weights = cast(unstack_layers(params), compute.dtype)
    for line in default_settings(self.generation, config.architecture)[1]:
      log.warning("generation_config.json: %s", line)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
      raise DataError(
        f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {config.vocab_size}; "
        "it belongs to another model"
      )

  @property
  def params(self) -> Params:
    """The parameters, layers stacked: a copy made at every call, since the model keeps each layer apart."""
    return stack_layers(self._weights)

  def quantize(self, format: str, group_size: int | None = None) -> None:
    """Rounds the weights to a format of `jaxllm.kernels.quantize` (int8, int4, nf4, …), those that can be. A table of
    token vectors that is the head as well is rounded to int8, with a scale for each token: all of it is read for
    each token that is drawn.

    Raises:
      ConfigError: no such format, or groups that do not divide a matrix.
    """
    change = lambda path, w: quantize_matrix(path, w, format, group_size)  # noqa: E731
    self._weights = map_weights_with_path(change, self._weights)
    if self.config.tie_embeddings and self.config.head == "lm" and format in ("int8", "int4", "nf4"):
      embedding = self._weights["embedding"]
      self._weights |= {"embedding": embedding | {"tokens": quantize_table(embedding["tokens"])}}
    self.__dict__.pop("_generator", None)  # which has the old ones

  def compute_with(self, **settings: Any) -> None:
    """Changes how it computes: fields of `Compute` other than the dtype, which its weights have.

    Raises:
      ConfigError: settings that do not go together, or not with this model.
    """
    self.compute = dataclasses.replace(self.compute, **settings)
    self.graph = declare(self.config, self.compute)[0]
    self.__dict__.pop("_generator", None)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    encoder_inputs: Int[Array, "B S"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    encoder_segment_ids: Int[Array, "B S"] | None = None,
  ) -> Float[Array, "B T V"]:
    """float32 logits of token ids; of a classifier those of the labels, for each token or for each row.

    Args:
      encoder_inputs: what an encoder_decoder's encoder reads.
      segment_ids, encoder_segment_ids: 0 where there is padding, 1 where there is text (transformers'
        `attention_mask`); None: all is text, whatever its ids.

    Raises:
      ConfigError: the tokens are not [B, T], too long, or not in the vocabulary; the segments are of another shape; or
        the model has no head.
    """
    reads_two = self.config.architecture == "encoder_decoder"
    if reads_two != (encoder_inputs is not None):
      raise ConfigError(f"this {self.config.architecture} takes {'' if reads_two else 'no '}encoder_inputs")
    if self.config.head == "none":
      raise ConfigError("the model has no head and so no logits; `encode` gives its hidden states")
    source = None if encoder_inputs is None else self._checked(encoder_inputs)
    own = self._checked(tokens)
    for name, ids, of in (("segment_ids", segment_ids, own), ("encoder_segment_ids", encoder_segment_ids, source)):
      if ids is not None and (of is None or np.shape(ids) != of.shape):
        raise ConfigError(f"{name} is of shape {np.shape(ids)}; it must be that of the tokens")
    return _forward(self.graph)(self._weights, own, source, segment_ids, encoder_segment_ids)

  def _checked(self, tokens) -> np.ndarray:
    ids = np.asarray(tokens)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
      raise ConfigError(f"a model takes integer tokens [B, T], not {ids.dtype} of shape {ids.shape}")
    if ids.shape[1] > longest_text(self.config):
      raise ConfigError(
        f"{ids.shape[1]} tokens: the sequence length is over the model's limit of {self.config.max_seq_len}"
      )
    if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
      raise ConfigError(f"token ids must be between 0 and {self.config.vocab_size - 1}")
    return ids.astype(np.int32)

  def encode(self, texts: Prompt | Sequence[Prompt]) -> list[Float[np.ndarray, "T D"]]:
    """The last layer's hidden states of each text's tokens (text, or token ids); float32.

    Text gets the tokenizer's special tokens ([CLS] … [SEP], say). Of an encoder_decoder: the encoder's.

    Raises:
      ConfigError: an empty or too long text.
    """
    return hidden_states(self.graph, self._weights, self.config, self._ids(texts))

  def embed(
    self,
    texts: Prompt | Sequence[Prompt],
    *,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    prompt: str | None = None,
  ) -> Float32[np.ndarray, "B D"]:
    """A vector for each text, so that similar texts have similar ones; Sentence-BERT (arXiv 1908.10084).

    A model with sentence-transformers' files gives what sentence-transformers gives; another the mean of a text's
    states, scaled to length 1.

    Args:
      pooling: how many states become one; None: as the files say.
      normalize: the vectors are scaled to length 1; None: as the files say.
      prompt: the name of what the files put before each text ("query", "document", …); None: their default.

    Raises:
      ConfigError: an empty or too long text, or no prompt of this name.
    """
    ours = self.vectors or TextVectors(steps=(None,))
    before = ours.prompt(prompt)
    single = isinstance(texts, str) or (len(texts) > 0 and isinstance(texts[0], int | np.integer))
    each: Sequence[Any] = [texts] if single else texts
    ids = [self._embedded_ids(ours, before, text) if isinstance(text, str) else text for text in each]
    skip = len(self.prompt_ids(before)) - 1 if before and not ours.count_prompt else 0
    modes = ours.pooling if pooling is None else (pooling,)
    out = embeddings(self.graph, self._weights, self.config, ids, pooling=modes, skip=skip)
    return ours.finish(out, normalize)

  def _embedded_ids(self, ours: TextVectors, before: str, text: str) -> list[int]:
    if self.vectors is None:
      return self.prompt_ids(text)
    text = (before + check_text(text, "the text")).strip()
    tokenizer, longest = self._text_tokenizer(), self.config.max_seq_len
    limit = min(ours.max_tokens or min(tokenizer.max_tokens or longest, longest), longest_text(self.config))
    return tokenizer.encode_prompt(_lower(text, tokenizer) if ours.lower else text, max_tokens=limit).tolist()

  def loss_sums(self, batch: dict[str, np.ndarray]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed loss in nats of a packed batch's targets, and the sum of their weights; for evaluation."""
    return _loss_sums(self.graph)(self._weights, batch)

  def generate(
    self,
    prompts: Prompt | Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    **settings,
  ) -> list[Completion]:
    """Completions of a prompt or of each of several (text, or token ids), all at once.

    Args:
      sampling: how to draw, for all prompts or for each; by default `self.sampling(**settings)`.
      settings: fields of SamplingParams, in place of `sampling`.

    Raises:
      ConfigError: an empty or too long prompt, or an impossible setting.
    """
    return self._generator.complete(*self._request(prompts, sampling, settings))

  def stream(
    self,
    prompts: Prompt | Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    **settings,
  ) -> Iterator[Delta]:
    """Like `generate`, as it happens: what every completion gains."""
    return self._generator.stream(*self._request(prompts, sampling, settings))

  def sampling(self, **settings) -> SamplingParams:
    """SamplingParams with the model's own defaults (see `jaxllm.inference.generation_config`) and these settings."""
    return default_sampling(self.generation, self.config.architecture, **settings)

  def prompt_ids(self, text: str) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer begins a text with."""
    tokenizer = self._text_tokenizer()
    return tokenizer.encode_prompt(check_text(text, "the prompt")).tolist() or [tokenizer.start_id]

  def chat_ids(
    self,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    continue_final_message: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
  ) -> list[int]:
    """Token ids of a chat, up to where the model's reply begins.

    Args:
      messages: {"role": "system", "user" or "assistant", "content": text} each, the oldest first.
      tools: JSON schemas of functions that the model may call.
      continue_final_message: the reply goes on with the last message rather than answering it.
      chat_template_kwargs: what else the model's template reads (documents, enable_thinking, …).

    Raises:
      ConfigError: the chat is longer than the model's context.
      DataError: the model has no chat template, or its template refuses the messages.
    """
    tokenizer = self._text_tokenizer()
    text = tokenizer.render_chat(
      messages,
      tools=tools,
      add_generation_prompt=not continue_final_message,
      continue_final_message=continue_final_message,
      **(chat_template_kwargs or {}),
    )
    ids = tokenizer.encode_chat(check_text(text, "the chat")).tolist()
    if len(ids) >= longest_text(self.config):
      raise ConfigError(
        f"the chat has {len(ids)} tokens, too many for the model's context of {self.config.max_seq_len}; "
        "leave out its oldest messages or start a new one"
      )
    return ids

  def chat(
    self,
    messages: Sequence[Message],
    sampling: SamplingParams | None = None,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    continue_final_message: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    **settings,
  ) -> Completion:
    """The model's reply to a chat: `generate` (which see) from `chat_ids` (which see)."""
    ids = self.chat_ids(messages, tools, continue_final_message, chat_template_kwargs)
    return self.generate(ids, sampling, **settings)[0]

  def stream_chat(
    self,
    messages: Sequence[Message],
    sampling: SamplingParams | None = None,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    continue_final_message: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    **settings,
  ) -> Iterator[Delta]:
    """Like `chat`, as it happens."""
    ids = self.chat_ids(messages, tools, continue_final_message, chat_template_kwargs)
    return self.stream(ids, sampling, **settings)

  def save(self, path: str | Path, format: Format = "jaxllm", **settings) -> None:
    """Writes a model directory, a Hugging Face directory ("hf") or a GGUF file.

    Args:
      settings: `dtype`, `quantize`, `family` and `max_shard_bytes` of `jaxllm.interop.write.write_model`.

    Raises:
      CheckpointError: the path holds something else, or cannot be written.
      ConfigError: an impossible setting, or the format cannot express the model.
    """
    ends = {"eos_token_id": list(self.eos_ids)} if self.eos_ids else {}  # transformers fails at an empty list
    about = {"source": dict(self.source), "vectors": self.vectors}
    stored = StoredModel(self.config, tensors_of(self._weights), self.tokenizer, ends | self.generation, **about)
    write_model(stored, path, format=format, **settings)

  def _ids(self, prompts: Prompt | Sequence[Prompt]) -> list[Sequence[int]]:
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | np.integer))
    each: Sequence[Any] = [prompts] if single else prompts
    return [self.prompt_ids(prompt) if isinstance(prompt, str) else prompt for prompt in each]

  def _request(self, prompts, sampling, settings):
    if sampling is None:
      sampling = self.sampling(**settings)
    elif settings:
      raise ConfigError(f"give either SamplingParams or {', '.join(settings)}, not both")
    return self._ids(prompts), sampling, self.eos_ids

  @functools.cached_property
  def _generator(self) -> Generator:
    return Generator(self.graph, self._weights, self.config, self.compute, self.tokenizer)

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """Tokens that end a text: what its generation_config.json says, or else its tokenizer, and the end of a turn."""
    ends = self.generation.get("eos_token_id")
    if ends is None and self.tokenizer is not None:
      ends = self.tokenizer.eos_id
    ends = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    turn = None if self.tokenizer is None else self.tokenizer.end_of_turn_id
    if turn is not None and turn not in ends:  # some models' files name only what ends a document
      ends += (turn,)
    return ends

  def _text_tokenizer(self) -> Tokenizer:
    if self.tokenizer is None:
      raise ConfigError("the model has no tokenizer; give prompts as token ids")
    return self.tokenizer


def _lower(text: str, tokenizer: Tokenizer) -> str:
  """The text in small letters, each by itself as `tokenizers` does it, but for special tokens."""
  special = sorted(filter(None, map(tokenizer.token_text, tokenizer.special_ids)), key=len, reverse=True)
  parts = re.split(f"({'|'.join(map(re.escape, special)) or '(?!)'})", text)
  return "".join(part if index % 2 else "".join(map(str.lower, part)) for index, part in enumerate(parts))


@functools.lru_cache(maxsize=8)
def _loss_sums(graph):
  return jax.jit(lambda weights, batch: CausalLM()({"policy": nnx.merge(graph, weights)}, batch).metrics["nll"])


@functools.lru_cache(maxsize=8)
def _forward(graph):
  def forward(weights, tokens, source, segments, source_segments):
    model = nnx.merge(graph, weights)
    if source is None:
      return model(tokens, segment_ids=segments)[0]
    encoded = model.encode(source, segment_ids=source_segments)
    return model(tokens, segment_ids=segments, encoded=encoded, encoded_segment_ids=source_segments)[0]

  return jax.jit(forward)
