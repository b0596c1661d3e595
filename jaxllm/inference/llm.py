"""`LLM`: a model and an engine of its own, in the shape of vLLM's."""

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from jaxllm.base.errors import ConfigError, DataError
from jaxllm.inference.completions import (
  CompletionOutput,
  EmbeddingOutput,
  EmbeddingRequestOutput,
  RequestOutput,
  request_outputs,
)
from jaxllm.inference.engine import Engine
from jaxllm.inference.engine.adapters import one_each
from jaxllm.inference.engine.kept import keep_programs
from jaxllm.inference.engine.replicas import Replicas
from jaxllm.inference.engine.request import check_tokens
from jaxllm.inference.engine.speculation import DraftModel, Speculation
from jaxllm.inference.load import load_model, load_with_adapters
from jaxllm.inference.model import Message
from jaxllm.inference.params import SamplingParams
from jaxllm.inference.prompts import room_for, token_ids
from jaxllm.inference.requests import Requests
from jaxllm.interop.open import Adapters
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh

log = logging.getLogger("jaxllm")

Prompt = str | Sequence[int] | Mapping[str, Any]


class LLM:
  """Writes text with a model, many prompts at once. Several threads may ask it: one's call waits for the other's.

  Attributes:
    model: the loaded `Model`. engine: its `Engine`.
  """

  def __init__(
    self,
    model: str | Path,
    *,
    adapter: Adapters = None,
    adapters: Mapping[str, Adapters] | None = None,
    dtype: str | None = None,
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    max_model_len: int | None = None,
    max_num_seqs: int = 16,
    num_pages: int | None = None,
    page_size: int = 16,
    max_num_batched_tokens: int | None = None,
    kv_cache_dtype: str | None = None,
    enable_prefix_caching: bool = True,
    max_logprobs: int = 20,
    seed: int | None = None,
    speculative: Mapping[str, Any] | None = None,
    quantization: str | None = None,
    batch_invariant: bool = False,
    compile_at_start: bool = True,
    **engine_settings: Any,
  ):
    """
    Args:
      model: whatever `load_model` reads. adapter: as there, and dtype.
      adapters: others of the same base, directories by name: each request is under one of them or none.
      tensor_parallel_size: devices over which weights and pages are split.
      data_parallel_size: how many times there are all weights and pages, each time on other devices.
      max_model_len: tokens of a prompt and its completion; None: the model's max_seq_len, beyond which a model
        may go whose positions are relative.
      max_num_seqs: completions that are computed at once; others wait.
      num_pages: of the cache of keys and values, each of `page_size` tokens; None: as many as are ever needed.
      max_num_batched_tokens: of a step; a longer prompt is read in several. None: 512, or fewer if no more are needed.
      kv_cache_dtype: also "int8" and "float8_e4m3fn".
      seed: makes what is drawn without a seed of its own the same in every run.
      speculative: {"method": "ngram"} guesses from what the text has said before, {"method": "draft", "model": PATH}
        with a small model; the others are fields of `jaxllm.inference.engine.speculation.Speculation`. The text stays
        the same.
      quantization: of the weights, a format of `jaxllm.kernels.quantize`: "int8", "int4", "nf4", ….
      batch_invariant: a request's tokens and log-probabilities are the same to the bit whatever else runs (on one CPU;
        see docs/engine.md).
      compile_at_start: all programs, so that no request waits for one, and they are kept on disk for the next start;
        False: each when it is first needed.
      engine_settings: others of `Engine`.

    Raises:
      CheckpointError, ConfigError, DataError: as `load_model` and `Engine`.
    """
    if seed is not None and (not isinstance(seed, int) or seed < 0):
      raise ConfigError(f"seed is {seed!r}; it must be a whole number of at least 0")
    if compile_at_start:
      keep_programs()
    places = _places(tensor_parallel_size, data_parallel_size)
    mesh = places[0] if isinstance(places[0], Mesh) else None
    self.model, several = load_with_adapters(model, adapters or {}, adapter=adapter, dtype=dtype, mesh=mesh)
    if quantization is not None:
      self.model.quantize(quantization)
    if batch_invariant:
      if len(places) > 1 or mesh is not None:
        raise ConfigError(
          "batch_invariant is for one CPU device; leave tensor_parallel_size and data_parallel_size at 1"
        )
      self.model.compute_with(batch_invariant=True)
    settings: dict[str, Any] = dict(
      max_model_len=max_model_len,
      max_num_seqs=max_num_seqs,
      num_pages=num_pages,
      page_size=page_size,
      max_tokens_per_step=max_num_batched_tokens,
      kv_dtype=kv_cache_dtype,
      prefix_cache=enable_prefix_caching,
      max_logprobs=max_logprobs,
      speculative=None if speculative is None else _speculation(speculative, dtype),
      adapters=several,
      **engine_settings,
    )
    self.engine: Engine | Replicas
    if data_parallel_size == 1:
      self.engine = Engine.of(self.model, mesh=mesh, **settings)
    else:
      own = self.model
      self.engine = Replicas(own.config, own._weights, places=places, compute=own.compute, **settings)
    self._requests = Requests(self.engine, self.model.tokenizer, self.model.eos_ids)
    self._seed, self._asked, self._one = seed, 0, threading.RLock()
    if compile_at_start:
      self.engine.warm_up()

  def get_default_sampling_params(self) -> SamplingParams:
    """The model's own, from its generation_config.json."""
    return self.model.sampling()

  def generate(
    self,
    prompts: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    adapter: str | Sequence[str | None] | None = None,
  ) -> list[RequestOutput]:
    """Completes a prompt, or each of several: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.

    A prompt that is refused harms no other: its answer has one output with the finish_reason "error" and an `error`.

    Args:
      sampling_params: for all prompts, or for each; None: the model's own.
      adapter: the name of one of `adapters`, for all prompts or for each; None: the model without them.

    Raises:
      ConfigError: every prompt was refused; what the first one's answer says.
    """
    return self._generate([functools.partial(self._ids, one) for one in _listed(prompts)], sampling_params, adapter)

  def _generate(
    self,
    each: Sequence[Callable[[], tuple[str | None, list[int]]]],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    adapter: str | Sequence[str | None] | None,
  ) -> list[RequestOutput]:
    """`generate`, with what reads each prompt: its text, if it has one, and token ids."""
    own = self.model.sampling() if sampling_params is None else sampling_params
    settings = [own] * len(each) if isinstance(own, SamplingParams) else own
    if not isinstance(settings, Sequence) or not all(isinstance(one, SamplingParams) for one in settings):
      raise ConfigError("sampling settings must be SamplingParams: one, or one for each prompt")
    if len(settings) != len(each):
      raise ConfigError(f"{len(settings)} sampling settings for {len(each)} prompts; give one, or one for each")
    names = one_each(adapter, len(each))
    asked: list[int | RequestOutput] = []
    with self._one:
      try:
        for question in zip(each, settings, names):
          asked.append(self._submit(*question))
        while any(isinstance(one, int) for one in asked) and self._requests.busy:
          self._requests.step()
      except BaseException:  # an interruption: the next call finds an empty engine
        for one in asked:
          if isinstance(one, int):
            self._requests.forget(one)
        raise
      answers = [self._requests.output(one) if isinstance(one, int) else one for one in asked]
    wrong = [answer.error for answer in answers if answer.error is not None]
    if wrong and len(wrong) == len(answers):
      raise ConfigError(wrong[0])
    for message in wrong:
      log.warning("a request was refused: %s", message)
    return answers

  def chat(
    self,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    continue_final_message: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    adapter: str | Sequence[str | None] | None = None,
  ) -> list[RequestOutput]:
    """The reply to a chat, or to each of several; see `Model.chat_ids` and `generate`."""
    chats = [messages] if messages and isinstance(messages[0], Mapping) else messages

    def reads(chat):
      return lambda: (None, self.model.chat_ids(chat, tools, continue_final_message, chat_template_kwargs))

    return self._generate([reads(chat) for chat in chats], sampling_params, adapter)

  def embed(
    self, prompts: Prompt | Sequence[Prompt], *, pooling: Literal["mean", "first"] = "mean", normalize: bool = True
  ) -> list[EmbeddingRequestOutput]:
    """A vector for each text; see `Model.embed`."""
    ids = [self._ids(prompt)[1] for prompt in _listed(prompts)]
    vectors = self.model.embed(ids, pooling=pooling, normalize=normalize)
    return [
      EmbeddingRequestOutput(
        request_id=str(number), prompt_token_ids=tuple(one), outputs=EmbeddingOutput(tuple(vector.tolist()))
      )
      for number, (one, vector) in enumerate(zip(ids, vectors))
    ]

  def score(
    self, prompts: Prompt | Sequence[Prompt], *, adapter: str | Sequence[str | None] | None = None
  ) -> list[Float32[np.ndarray, " T-1"]]:
    """Of each text the log-probabilities, in nats, of its tokens from the second on; see `Engine.score`."""
    texts = [self._ids(prompt)[1] for prompt in _listed(prompts)]
    with self._one:
      return self.engine.score(texts, adapter)

  def stats(self) -> dict[str, Any]:
    """Counts of the engine: see `Engine.stats`."""
    return self.engine.stats()

  def _ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
    if isinstance(prompt, Mapping):
      known = [name for name in ("prompt_token_ids", "prompt") if prompt.get(name) is not None]
      if not known:
        raise ConfigError(
          f"a prompt of {', '.join(map(repr, prompt)) or 'nothing'}; it needs prompt_token_ids or prompt"
        )
      text = prompt.get("prompt")
      if known[0] == "prompt":
        return text, self.model.prompt_ids(text)
      return text, token_ids(prompt["prompt_token_ids"], "the prompt")
    if isinstance(prompt, str):
      return prompt, self.model.prompt_ids(prompt)
    return None, token_ids(prompt, "the prompt")

  def _submit(
    self, read: Callable[[], tuple[str | None, list[int]]], settings: SamplingParams, adapter: str | None
  ) -> "int | RequestOutput":
    """The number of a request, or at once the answer: of beam search, or to one that is refused."""
    text: str | None = None
    ids: list[int] = []
    try:
      text, ids = read()
      if settings.num_beams > 1:
        if adapter is not None:
          raise ConfigError("num_beams: beams are of one model; load it with this adapter alone (adapter=)")
        return self._searched(text, ids, settings)
      if settings.seed is None and self._seed is not None:
        words = np.random.SeedSequence((self._seed, self._asked)).generate_state(1, np.uint64)
        settings = dataclasses.replace(settings, seed=int(words[0]))
      self._asked += 1
      return self._requests.submit(ids, settings, text=text, adapter=adapter)
    except (ConfigError, DataError) as error:
      refused = CompletionOutput(index=0, text="", token_ids=(), finish_reason="error", error=str(error))
      return RequestOutput(request_id="", prompt=text, prompt_token_ids=tuple(ids), outputs=(refused,), finished=True)

  def _searched(self, text: str | None, ids: list[int], settings: SamplingParams) -> RequestOutput:
    """The answer of a beam search, which has pages of its own, within this engine's limit."""
    if settings.prompt_logprobs is not None:
      raise ConfigError("num_beams: beam search gives no prompt_logprobs")
    c, longest = self.model.config, self.engine.sizes.max_model_len
    check_tokens(ids, "the prompt", c.vocab_size, *self.engine.sizes.longest_prompt())
    first = ids if c.architecture == "decoder" else [c.decoder_start_id]
    settings = dataclasses.replace(settings, max_tokens=room_for(settings, first, longest))
    return request_outputs(self.model.generate([ids], settings), [text], [ids])[0]


def _places(tensor: int, data: int) -> "list[jax.Device | Mesh]":
  """The devices of each replica."""
  devices = jax.devices()
  for name, size in (("tensor_parallel_size", tensor), ("data_parallel_size", data)):
    if not isinstance(size, int) or size < 1:
      raise ConfigError(f"{name} is {size!r}; it must be a whole number of at least 1")
  if tensor * data > len(devices):
    sizes = f"tensor_parallel_size is {tensor} and data_parallel_size {data}"
    raise ConfigError(f"{sizes}; there {'is' if len(devices) == 1 else 'are'} {len(devices)} device(s)")
  each = [devices[i * tensor : (i + 1) * tensor] for i in range(data)]
  if tensor == 1:
    return [own[0] for own in each]
  return [make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor), own) for own in each]


def _listed(prompts: Any) -> list[Prompt]:
  """The prompts, of which there may be one alone."""
  if isinstance(prompts, str | Mapping):
    return [prompts]
  if not isinstance(prompts, Sequence | np.ndarray) or isinstance(prompts, bytes):
    raise ConfigError(f"prompts is a {type(prompts).__name__}; give text, token ids, or a list of them")
  single = len(prompts) > 0 and isinstance(prompts[0], int | float | np.number)
  return [prompts] if single else list(prompts)  # type: ignore[list-item]


def _speculation(settings: Mapping[str, Any], dtype: str | None) -> Speculation:
  if not isinstance(settings, Mapping):
    raise ConfigError(f"speculative is {settings!r}; it must be a dict, such as {{'method': 'ngram'}}")
  others = {name: value for name, value in settings.items() if name != "model"}
  if settings.get("model") is None:
    return Speculation.of(others)
  draft = load_model(settings["model"], dtype=dtype)
  return Speculation.of(others, DraftModel(draft.config, draft._weights, draft.compute))
