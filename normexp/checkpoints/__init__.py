"""Checkpoints: selecting, averaging, recovering, and importing the authors'."""
