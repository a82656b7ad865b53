"""The error tree. Everything this project raises on purpose is a SprintError:

    SprintError
    ├── CheckpointError      a checkpoint folder is wrong, truncated, mismatched or not a Sprint checkpoint
    ├── ArtifactError        a built engine does not fit this machine, this checkpoint, or is damaged
    ├── BuildError           a build was refused or failed; nothing was left behind
    │   ├── ParityError      an engine was built, and is too far from the reference
    │   └── DiskFullError    there was no room for what is built
    ├── BackendError         a backend cannot run here (package or device missing), or refuses a shape
    ├── JobError             a job is outside what the engine can run; the message names field, value and bounds
    ├── OutOfMemoryError     the batch did not fit into memory; a smaller one may
    └── OutputError          the engine produced NaN or an empty picture
        (server.errors continues the tree with what only HTTP knows)

Messages say what was got, what is allowed, and what to do.
"""


class SprintError(Exception):
    """Root of every error that this project raises on purpose."""


class CheckpointError(SprintError):
    """A checkpoint is missing something, is damaged, or is of another kind. One line, with the remedy."""


class ArtifactError(SprintError):
    """A built engine does not fit. One line: what differs and the command that rebuilds it."""


class BuildError(SprintError):
    """A build was refused or failed."""


class ParityError(BuildError):
    """An engine is further from its reference than its gate allows."""


class DiskFullError(BuildError):
    """A build found no room for its files; with more, the same build may do."""


class BackendError(SprintError):
    """A backend cannot run here."""


class JobError(SprintError):
    """A job is outside the engine's limits."""


class OutOfMemoryError(SprintError):
    """The device had no memory for this batch."""


class OutputError(SprintError):
    """The engine ran and its output cannot be a picture."""
