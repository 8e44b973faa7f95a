"""hymba-tune: post-train NVIDIA's Hymba. Importing the package imports nothing else."""

__version__ = "0.1.0"
