"""The HTTP server: base and adapters side by side, in shared batches."""
