"""Text that the model writes while it is trained."""

import dataclasses
from typing import Any

from jaxllm.data.tokenizers import Tokenizer
from jaxllm.inference.model import Model
from jaxllm.inference.params import SamplingParams
from jaxllm.training.compile import Program
from jaxllm.training.config import TrainingConfig


def sample_text(program: Program, params: Any, tokenizer: Tokenizer, training: TrainingConfig) -> str:
  """Continues each of `training.sample_prompts`; several processes all call this."""
  # A backend that was named for the step's attention need not know a cache, and would raise.
  compute = dataclasses.replace(program.compute, attention="auto")
  model = Model(program.model, params, tokenizer, compute=compute)
  sampling = SamplingParams(
    temperature=training.sample_temperature, max_tokens=training.sample_tokens, seed=training.seed
  )
  completions = model.generate(list(training.sample_prompts), sampling)
  pairs = zip(training.sample_prompts, completions, strict=True)
  return "\n".join(f"----- {prompt!r}\n{prompt}{completion.text}" for prompt, completion in pairs) + "\n"
