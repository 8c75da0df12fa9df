"""What a run leaves on disk: its folder, its record, and what was there before."""
