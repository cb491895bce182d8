"""The failure vocabulary: every error a user can meet, and what it means for the run.

    TessyError
    ├── SettingsError      a setting is unknown or out of range                      → nothing starts
    ├── DatasetError       the dataset lacks a column, or would lose one             → nothing starts
    ├── TemplateError      a chat template cannot carry open or finished thinking    → nothing starts
    ├── BoundaryError      a boundary predictor cannot be read without more knowledge → nothing starts
    ├── JournalError       the journal cannot be read or written                     → nothing starts, or the run stops
    ├── PartsError         rows on shared storage cannot be read or written          → nothing starts, or the run stops
    ├── MergeError         rows are missing, or differ between hosts                 → nothing is written
    ├── OutputError        a file for rows cannot be written, or would replace others → nothing starts, or is written
    ├── HubError           the Hub refuses or does not answer                        → no version, or the complete one
    │   └── VersionError   a version exists with other rows, or is not valid         → nothing starts
    ├── SandboxError       programs cannot be isolated on this system                → nothing starts
    ├── PromptError        one row's prompt cannot be used                           → that row fails, with this text
    └── EngineError        an engine could not answer
        ├── RequestError   one request failed for good                               → that row fails, with this text
        └── EngineDeadError the engine is gone or refuses the credential             → the run stops, rows are kept

Each message says what was seen, what was expected and what to do.
"""


class TessyError(Exception):
    """Base class of all errors that this package raises on purpose."""


class SettingsError(TessyError, ValueError):
    """A setting is unknown, missing or out of range."""


class DatasetError(TessyError, ValueError):
    """The dataset does not fit the transform: a column is missing or would be overwritten."""


class TemplateError(TessyError, ValueError):
    """A chat template or tokenizer cannot carry the thinking the way the method needs."""


class BoundaryError(TessyError, ValueError):
    """A boundary predictor cannot be loaded or its labels cannot be read."""


class JournalError(TessyError, OSError):
    """The journal cannot be read or written. What is committed in it is unchanged."""


class PartsError(TessyError, OSError):
    """Rows on shared storage cannot be read or written, or belong to another run. Nothing there is changed."""


class MergeError(TessyError, ValueError):
    """Rows are missing, differ between hosts, or cannot be checked."""


class OutputError(TessyError, OSError):
    """A file for finished rows cannot be written, or would replace something else. What was there is as it was."""


class HubError(TessyError, RuntimeError):
    """The Hub refuses or does not answer. ``main`` and the tags hold the old release or the complete new one."""


class VersionError(HubError, ValueError):
    """A version cannot be pushed: it exists with other rows, is below the last one, or is not a valid version."""


class SandboxError(TessyError, RuntimeError):
    """This system cannot isolate programs in the requested way."""


class PromptError(TessyError, ValueError):
    """One row's prompt cannot be used. The row fails with this text; the run goes on."""


class EngineError(TessyError, RuntimeError):
    """An engine could not answer a request.

    Attributes:
        retryable: Whether the same request may succeed when sent again.
    """

    retryable = False


class RequestError(EngineError):
    """One request failed for good. Its row fails with this text; the run goes on.

    Args:
        message: What was seen, what was expected, what to do.
        retryable: Whether the same request may succeed when sent again.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class EngineDeadError(EngineError):
    """The engine is gone for good, or refuses the credential. The run stops."""
