"""The base model and its adapter: find, load, measure, generate."""
