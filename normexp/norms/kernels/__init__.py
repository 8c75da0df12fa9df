"""Compiled implementations of training steps, and the choice among them."""
