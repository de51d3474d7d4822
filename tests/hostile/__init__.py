"""Hostile and wrong inputs for every program: each must end in time, in one clear line, with nothing else changed."""
