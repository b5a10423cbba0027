"""Keeping edits and passing them on: where they come from, model cards, libraries, the Hub."""
