"""Errors whose message is one line for a person: what was wrong, where, and what is accepted.

The command line and `train_gpt.py` print the message alone and exit with status 2.
"""


class PgolfError(Exception):
    """Base of every error that is reported as one line."""


class UserError(PgolfError, ValueError):
    """A setting, argument or environment variable that cannot be used."""


class DataError(PgolfError, ValueError):
    """A shard, tokenizer or text file that cannot be used; the message names the file and the offset."""


class ScoreError(PgolfError, ArithmeticError):
    """A model that has no score: the sum of its losses is not a number, or infinite."""


class ArtifactError(PgolfError, ValueError):
    """A `.pgolf` file that is damaged, hostile, or of a version this build does not read."""
