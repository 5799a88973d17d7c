"""SimpleRL's score, of which accuracy is a part that is passed in."""

from collections.abc import Mapping
from typing import Any

from r1jax.rewards.weighted import Reward


def simple_rl(
    row: Mapping[str, Any], answer: str, *, accuracy: Reward, mark: str = "boxed"
) -> float | None:
    r"""1.0 if right, -0.5 if wrong, -1.0 if the text has no `mark`; None if it cannot be judged.

    As published, the word alone counts, without a backslash or braces, and a right answer that
    was found outside a box scores -1.0 too.

    Source: github.com/hkust-nlp/simpleRL-reason, branch v0,
    train/openrlhf/trainer/ppo_utils/experience_maker.py, preprocess_box_response_for_qwen_prompt.
    """
    if mark not in answer:
        return -1.0
    verdict = accuracy(row, answer)
    if verdict is None:
        return None
    return 1.0 if verdict >= 1.0 else -0.5
