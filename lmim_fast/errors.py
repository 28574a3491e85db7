"""Errors that are the user's to mend: the command line prints them as one line."""


class LmimError(Exception):
    """A failure with a message for the user; the command line exits with 1."""


class UsageError(LmimError):
    """A wrong option or path; the command line exits with 2."""


class DataError(LmimError):
    """A record or a database that cannot be used."""


class WeightsError(LmimError):
    """A checkpoint that does not fit the model, with the names and shapes in the message."""
