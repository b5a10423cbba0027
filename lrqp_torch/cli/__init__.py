"""The ``lrqp`` command, one file for each group of its commands."""

from lrqp_torch.cli import doctor, study  # their import adds the commands
from lrqp_torch.cli.app import app

__all__ = ["app", "doctor", "main", "study"]


def main() -> None:
    """Run the ``lrqp`` command."""
    app()
