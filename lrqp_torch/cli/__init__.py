"""The ``lrqp`` command, one file for each group of its commands."""

import os
import sys

# Their import adds the commands.
from lrqp_torch.cli import benchmark, capture, doctor, own, serve, study, verdicts
from lrqp_torch.cli.app import app

__all__ = ["app", "benchmark", "capture", "doctor", "main", "own", "serve", "study", "verdicts"]


def main() -> None:
    """Run the ``lrqp`` command; of many processes, rank 0 alone explains a wrong command line."""
    if os.environ.get("RANK", "0") == "0":
        app()
        return
    try:
        sys.exit(app(standalone_mode=False))
    except Exception as error:
        # The class depends on whether this typer brings its own click.
        if not hasattr(error, "exit_code"):
            raise
        sys.exit(error.exit_code)
