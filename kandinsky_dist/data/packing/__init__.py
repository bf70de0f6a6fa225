"""Shards written by us: from folders, tables and datasets, and the demo corpus."""
