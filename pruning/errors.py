"""Every error a user can cause, and the exit code of each.

    ShoalError
    ├── UserError           exit 2: the request cannot be carried out; nothing was written
    │   ├── RecipeError         a flag or a recipe key
    │   ├── ModelError          the model to prune
    │   ├── CalibrationError    the calibration text
    │   ├── EvaluationError     what a model is evaluated on
    │   ├── CheckpointError     a checkpoint directory
    │   ├── NumberError         a weight or a loss that is not finite
    │   └── StorageError        the place to write to
    └── Interrupted         exit 130

A message says what was wrong, with the value, and what to do.
"""


class ShoalError(Exception):
    """Base of all errors that end in one line instead of a traceback."""

    exit_code = 1


class UserError(ShoalError):
    """The request cannot be carried out; nothing was written."""

    exit_code = 2


class RecipeError(UserError):
    """A flag or recipe key is unknown, out of range or contradicts another."""


class ModelError(UserError):
    """The model cannot be found, read or pruned."""


class CalibrationError(UserError):
    """The calibration text cannot be read or is too short."""


class EvaluationError(UserError):
    """The text, questions or tasks cannot be read or do not fit the model."""


class CheckpointError(UserError):
    """A checkpoint directory is incomplete, altered or of another format."""


class NumberError(UserError):
    """A weight, a loss or what would be written is not finite."""


class StorageError(UserError):
    """The output cannot be written."""


class Interrupted(ShoalError):
    """The user stopped the run."""

    exit_code = 130
