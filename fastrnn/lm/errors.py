"""The one kind of error that the command line reports as a single line."""

from __future__ import annotations

import argparse
from typing import NoReturn

USER_ERROR = 2


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, as all other errors."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"fastrnn: {message} (see {self.prog} --help)\n")


class UserError(Exception):
    """Something the user can mend: a bad option, file or output path. The message is one line."""


def os_reason(error: OSError) -> str:
    """The short reason of an OSError ("No such file or directory"), without number and path."""
    return error.strerror or type(error).__name__


class LostProcessError(UserError):
    """Another process of the run is gone; what connects them cannot be taken down in order then."""
