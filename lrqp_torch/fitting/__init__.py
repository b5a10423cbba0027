"""Fitting probes: the penalised multinomial likelihood, and Newton's method for many at once."""
