"""Statistics of several ranks."""
