"""Errors that are the user's to mend: each message is one line that says what is wrong and what to do.

The doors print such an error without a traceback and exit with code 2; anything else is a bug of ours.
"""


class UserError(Exception):
  """Something outside the program is wrong; the message says what, and what to do about it."""


class ConfigError(UserError):
  """The config names an unknown key, has a wrong type, or asks for an impossible combination."""


class DataError(UserError):
  """A corpus, shard or tokenizer is missing, empty, damaged, or does not fit the model."""


class CheckpointError(UserError):
  """A checkpoint is missing, damaged, belongs to another model, or cannot be written."""
