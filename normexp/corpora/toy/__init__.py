"""Toy corpora made on the spot."""
