"""From tar shards to batches on the device: every sample exactly once an epoch, resumed by one integer."""
