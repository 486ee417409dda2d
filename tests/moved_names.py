"""A torch in which one of the private names that the package uses is another, or takes other arguments."""

from fomaml.engines import _torch


def gone(name, monkeypatch):
    """This name stands for nothing."""
    find = _torch.find

    def other(asked, owner=None):
        if asked == name:
            raise _torch.Missing(name)
        return find(asked, owner)

    monkeypatch.setattr(_torch, "find", other)


def broken(name, monkeypatch):
    """What it stands for takes no such arguments."""
    find = _torch.find

    def refuse(*arguments, **options):
        raise TypeError("unexpected arguments")

    def other(asked, owner=None):
        return refuse if asked == name else find(asked, owner)

    monkeypatch.setattr(_torch, "find", other)
