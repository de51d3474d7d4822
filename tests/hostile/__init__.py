"""Hostile and wrong inputs for every program: each must end in time, with one clear line, and change nothing else."""
