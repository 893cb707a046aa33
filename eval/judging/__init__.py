"""Votes on which of two answers is better, by a person or an endpoint."""
