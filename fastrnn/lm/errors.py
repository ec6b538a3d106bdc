"""The one kind of error that the command line reports as a single line."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: a bad option, file or output path. The message is one line."""


def os_reason(error: OSError) -> str:
    """The short reason of an OSError ("No such file or directory"), without number and path."""
    return error.strerror or type(error).__name__


class LostProcessError(UserError):
    """Another process of the run is gone; what connects them cannot be taken down in order then."""
