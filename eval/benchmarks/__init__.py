"""Measure this project itself: speed, memory, de-identification."""
