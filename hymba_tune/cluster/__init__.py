"""Scripts that start a recipe on several machines: a SLURM job, or hosts that ssh reaches."""
