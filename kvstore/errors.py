"""The project's one error tree.

    SamovarError
    ├── UsageError (also a ValueError)   the caller's bug or bad input; the sentence says what to do
    │   ├── ConfigError                  a setting that is unknown, malformed or contradicts another
    │   └── GeometryError                buffers, cells or tokens that do not fit the namespace
    ├── StateError                       a folder in use, foreign, or of another version
    └── UnavailableError                 a node did not answer within its deadline

A miss is never an error: look-ups and reads answer with outcomes. ``UnavailableError`` is raised
inside the tier only; the client turns it into a shorter prefix.
"""


class SamovarError(Exception):
    """Base of everything that this project raises on purpose."""


class UsageError(SamovarError, ValueError):
    """The caller asked for something that cannot be; nothing was changed."""


class ConfigError(UsageError):
    """A setting is unknown, malformed or contradicts another one."""


class GeometryError(UsageError):
    """Buffers, cells or token ids do not fit the namespace."""


class StateError(SamovarError):
    """A folder is in use by another process, foreign, or of another format version."""


class UnavailableError(SamovarError):
    """A node did not answer within its deadline."""
