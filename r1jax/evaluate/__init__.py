"""Measures answers: pass@k, maj@k, best of k, accuracy against tokens; intervals with all of it."""
