"""Measure and compare models on records that none of them was trained on."""
