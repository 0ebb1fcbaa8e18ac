"""The command ``raysft``: parser, verbs, and exit codes. Verbs import heavy libraries only when they run."""

from raysft.cli.command import main

__all__ = ["main"]
