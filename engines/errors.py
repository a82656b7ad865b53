"""The error tree. Every error that this project raises on purpose is a SprintError:

    SprintError
    ├── CheckpointError      a checkpoint is wrong, truncated, mismatched or not a Sprint checkpoint
    ├── ArtifactError        a built engine does not fit the machine or the checkpoint, or is damaged
    ├── BuildError           a build was refused or failed; it leaves nothing behind
    │   ├── ParityError      a built engine is too far from the reference
    │   └── DiskFullError    the disk has no room for the build
    ├── BackendError         a package or device is missing, or the backend refuses a shape
    │   └── CaptureError     a CUDA graph cannot hold this work, which runs without one
    ├── JobError             a job is outside the limits; the message names field, value and bounds
    ├── OutOfMemoryError     the batch does not fit into memory; a smaller one may
    └── OutputError          the engine made NaN or an empty image
        (server.errors adds the errors of HTTP)

A message names the value got, the allowed values and the remedy.
"""


class SprintError(Exception):
    """Root of every error that this project raises on purpose."""


class CheckpointError(SprintError):
    """A checkpoint is incomplete, damaged or of another kind. One line, with the remedy."""


class ArtifactError(SprintError):
    """A built engine does not fit. One line: the difference and the command that rebuilds it."""


class BuildError(SprintError):
    """A build was refused or failed."""


class ParityError(BuildError):
    """An engine is further from its reference than its gate allows."""


class DiskFullError(BuildError):
    """A build has no room for its files. The same build may succeed with more room."""


class BackendError(SprintError):
    """A backend cannot run here."""


class CaptureError(BackendError):
    """A CUDA graph could not be captured. Launches and other captures go on."""


class JobError(SprintError):
    """A job is outside the engine's limits."""


class OutOfMemoryError(SprintError):
    """The device has no memory for this batch."""


class OutputError(SprintError):
    """The engine ran, and its output is no valid image."""


def in_one_line(error: BaseException) -> str:
    """Returns the type of an error and the first line of its message, cut to 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
