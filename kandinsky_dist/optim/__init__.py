"""AdamW, its parameter groups and the learning-rate schedule."""
