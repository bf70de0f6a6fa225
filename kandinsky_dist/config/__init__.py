"""Typed configuration: schema, loading, cross-field rules. Never imports torch."""
