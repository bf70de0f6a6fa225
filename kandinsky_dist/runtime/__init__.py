"""Distributed runtime: who this process is, what ranks agree on, randomness, logs."""
