"""One reward for rows of many kinds: each row names the rule that scores its answers."""

import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from r1jax.rewards.weighted import Reward

# By what a row's `verifier` may say. Imported when first used: some need slow libraries.
VERIFIERS = {
    "code": "r1jax.rewards.code:accuracy",
    "countdown": "r1jax.rewards.countdown:accuracy",
    "math": "r1jax.rewards.math:accuracy",
    "tiny_zero": "r1jax.rewards.countdown:tiny_zero",
}


def by_verifier(row: Mapping[str, Any], answer: str) -> float | None:
    """The score of the rule that `row["verifier"]` names, one of `VERIFIERS`.

    Raises:
      ValueError: the row has no `verifier` or an unknown one; or what the rule raises.
    """
    name = row.get("verifier")
    if not isinstance(name, str) or name not in VERIFIERS:
        raise ValueError(f"row['verifier'] must be one of {', '.join(VERIFIERS)}, got {name!r}")
    return _load(name)(row, answer)


@cache
def _load(name: str) -> Reward:
    return pkgutil.resolve_name(VERIFIERS[name])
