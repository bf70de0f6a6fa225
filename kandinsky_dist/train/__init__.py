"""The trainer: one loop for both stages and all strategies."""
