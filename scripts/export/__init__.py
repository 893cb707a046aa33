"""Merge an adapter into its base, prove the result and describe it."""
