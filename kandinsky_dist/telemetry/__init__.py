"""Throughput, FLOPs, metric sinks and progress."""
