"""Math answers, in LaTeX or plain text, against a gold answer."""

from r1jax.rewards.math.score import accuracies, accuracy

__all__ = ["accuracies", "accuracy"]
