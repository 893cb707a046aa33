"""What only the training commands need."""
