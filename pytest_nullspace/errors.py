"""Every error that a user of pytest-nullspace can meet.

    NullspaceError                  anything that is the user's to mend: one sentence, no traceback
    ├── CheckpointError             the adapter's directory: what lies in it, what is missing, what does not fit
    ├── TextError (ValueError)      the calibration text: not found, too short, no such column
    ├── OptionError (ValueError)    an option or ini value that cannot be taken
    ├── StatsError                  a saved statistics file that cannot be read or trusted
    └── MeasurementError            the pass itself: non-finite, interrupted, lost, incomplete

Each message says what is wrong, where, and what to do. Warnings are `NullspaceWarning`.
"""


class NullspaceError(Exception):
    """Something the user can mend; the message stands alone, without a traceback."""


class CheckpointError(NullspaceError):
    """The checkpoint cannot be read, is no adapter, or does not hold together."""


class TextError(NullspaceError, ValueError):
    """The calibration text cannot be had or cannot be cut into windows."""


class OptionError(NullspaceError, ValueError):
    """An option has a value that it does not take."""


class StatsError(NullspaceError):
    """A saved statistics file is unreadable, of another schema, or contradicts itself."""


class MeasurementError(NullspaceError):
    """The measurement did not produce figures that can be judged."""


class NullspaceWarning(UserWarning):
    """A figure lies in its warn tier; turn into a failure with ``-W error::pytest_nullspace.NullspaceWarning``."""
