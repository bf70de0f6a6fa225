"""Shards on web servers and in buckets: fetched ahead, cached on disk, retried until they are there."""
