"""The study: where a model knows a variable, and where it uses it, in parts that share one run."""
