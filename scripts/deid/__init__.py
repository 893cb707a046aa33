"""Find personal data and replace it."""
