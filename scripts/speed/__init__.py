"""Faster training with the same numbers; with `performance.fast_path` and `performance.compile` off, none of it is imported."""
