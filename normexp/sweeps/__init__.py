"""Many runs: which a sweep consists of, how they stand, and as jobs of a SLURM cluster."""
