"""Encoder outputs of a corpus, computed once and kept as shards that are trained on instead."""
