"""Errors that tell the user what was wrong, what is allowed, and what to do next.

Every error that a user can cause derives from `Flux2Error`; the command line prints its text without a traceback and
exits with its `exit_code`.
"""


class Flux2Error(Exception):
    """A failure with advice. Exit code 1."""

    exit_code = 1


class UsageError(Flux2Error):
    """A value that the caller gave is not allowed. Exit code 2."""

    exit_code = 2


class ImageError(UsageError):
    """A reference picture that cannot be used. Exit code 2."""


class CheckpointError(Flux2Error):
    """A checkpoint that is missing, unreadable, or of another model. Exit code 1."""


class BundleError(Flux2Error):
    """No bundle fits, or the one that was found is damaged or of another version. Exit code 3."""

    exit_code = 3


class DeviceError(Flux2Error):
    """A GPU that is missing, unfit or failed. Exit code 1."""


class DeviceMemoryError(DeviceError):
    """Less memory is free than is needed, or than was asked for. Exit code 1."""

    def __init__(self, message: str, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class Interrupted(Flux2Error):
    """The caller asked to stop. Exit code 130."""

    exit_code = 130
