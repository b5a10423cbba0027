"""Edits: a probe, a metric and an odds rule; their records, their failures, their files."""
