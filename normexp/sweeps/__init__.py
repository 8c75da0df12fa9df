"""Sweeps: their runs, the status of each run, and their jobs on a SLURM cluster."""
