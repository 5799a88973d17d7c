"""Rules that score an answer's text: functions (row, answer) -> float or None. No JAX."""
