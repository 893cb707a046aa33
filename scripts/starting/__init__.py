"""What `python -m scripts.start` looks at and decides before it writes a configuration."""
