"""Checkpoints of other trainers: read into ours, and ours written as one of theirs."""
