"""Commands of the command line, run in this process."""

import builtins

import pytest

from fomaml.app.cli import main


def refused(capsys, arguments):
    """The one line that a command says on standard error, with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("fomaml: error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error.removeprefix("fomaml: error: ").rstrip("\n")


def without(monkeypatch, library):
    """Let a library, or a module of one, be one that is not installed."""
    real = builtins.__import__

    def lacking(name, *arguments, **options):
        if name == library or name.startswith(f"{library}."):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", lacking)
