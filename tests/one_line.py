"""A command that is refused."""

from lmim_fast import cli


def error_of(capsys, arguments, code=2):
    """The one line on stderr of a command that must fail."""
    assert cli.main([str(argument) for argument in arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    return shown.err
