"""That the models which a run begins with read the tokens of its data."""

import logging

from jaxllm.base.errors import DataError
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.models.config import ModelConfig
from jaxllm.training.start import Start

logger = logging.getLogger("jaxllm")


def check_teachers(start: Start, tokenizer: Tokenizer, model: ModelConfig) -> None:
  """That every other model in files has the vocabulary of the data; of the policy, which may learn it, a warning.

  Args:
    tokenizer: the data's. model: the policy, whose vocabulary a model without a tokenizer must have.

  Raises:
    DataError: one has another.
  """
  for name, stored in start.teachers.items():
    theirs = stored.config.vocab_size
    if theirs < tokenizer.vocab_size or (stored.tokenizer is None and theirs != model.vocab_size):
      raise DataError(
        f"objective.{name} {stored.path} has a vocabulary of {theirs}, the data's tokenizer has {tokenizer.vocab_size} "
        f"and the policy {model.vocab_size}; choose a model with the same tokenizer"
      )
    if stored.tokenizer is not None and stored.tokenizer.pieces() != tokenizer.pieces():
      raise DataError(
        f"objective.{name} {stored.path} has another tokenizer than the data: their tokens differ; choose a model with "
        "the same one"
      )
  policy = None if start.policy is None else start.policy.tokenizer
  if policy is not None and policy.pieces()[: tokenizer.vocab_size] != tokenizer.pieces()[: policy.vocab_size]:
    logger.warning(
      "%s has another tokenizer than the data: what it has learned of its tokens is lost", start.config.path
    )
