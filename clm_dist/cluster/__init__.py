"""Runs as Slurm jobs: batch files written and submitted, what a node needs to know, how a run is doing. No torch."""
