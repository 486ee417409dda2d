"""`python -m fomaml` is the command `fomaml`."""

from fomaml.app.cli import main

if __name__ == "__main__":
    main()
