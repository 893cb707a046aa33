"""lm-eval on this project's models, tasks and tables."""
