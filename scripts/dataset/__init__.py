"""From a row of a file to token ids."""
