"""Where things happen in a model: sites, positions, hooks, reading, intervening, replay."""

TESTED_TRANSFORMERS = ("5.0.0", "5.23.0", "5.24.0")
"""Versions of transformers that the tests of this package run against, the oldest first."""
