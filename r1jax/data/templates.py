"""Prompt templates that papers print, word for word."""

# The line breaks in this source are none in the text.
R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>. User: {question}. Assistant:"
)


def r1_zero(question: str) -> str:
    """The prompt that R1-Zero continued. The full stop after the question is the paper's.

    Source: arXiv:2501.12948, Table 1.
    """
    return R1_ZERO.replace("{question}", question)
