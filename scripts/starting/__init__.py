"""What `scripts.start` looks at and decides before it writes a configuration."""
