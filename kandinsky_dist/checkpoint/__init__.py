"""Checkpoints over fragments, and export to diffusers folders."""
