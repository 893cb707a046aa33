"""The stages, one command per file, and the rooms with what they share."""
