"""Measured tables: JSON records, Markdown rendered from them."""
