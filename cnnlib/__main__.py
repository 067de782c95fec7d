"""`python -m cnnlib` is the command `cnnlib`."""

from cnnlib.cli.main import entry

if __name__ == "__main__":
    entry()
