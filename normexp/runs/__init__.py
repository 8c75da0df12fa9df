"""Files of a run: its folder, its record, and the archive of earlier ones."""
