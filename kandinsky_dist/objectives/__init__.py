"""What is computed on a batch: the prior and the decoder losses and their noise."""
