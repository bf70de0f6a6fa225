"""Throughput-first distributed training of the Kandinsky 2.2 prior and decoder."""

__version__ = "0.1.0"
