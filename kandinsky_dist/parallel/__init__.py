"""Strategies: the only place that knows which engine runs."""
