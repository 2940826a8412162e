"""What the system said, behind the errors of those who write files."""


def disk_error(error: BaseException | None) -> OSError | None:
    """The system's own error, if there is one behind this: torch goes on to write where the disk is full."""
    while error and not (isinstance(error, OSError) and error.strerror):
        error = error.__cause__ or error.__context__
    return error
