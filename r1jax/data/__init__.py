"""Rows: problems and texts, where they come from and how they become tokens. No JAX."""
