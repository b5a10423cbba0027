"""Linear probes, how they are fitted, the covariance and the metric, and what to keep."""
