"""Checkpoints of a run: written, hashed, checked and read."""
