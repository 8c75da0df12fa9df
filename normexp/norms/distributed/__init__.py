"""Statistics over the ranks of data-parallel training."""
