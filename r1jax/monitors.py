"""What is wrong with a run, in words: functions from recent metric rows to sentences.

A row is what one training step measured. Sentences name the limit, not the value, so that one
that lasts stays the same sentence. A row without a monitor's metric is silent.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

Row = Mapping[str, Any]

STEPS = 5  # that something must have lasted; one odd batch is no news
CUT_SHARE = 0.95  # of the answers
ENTROPY_FLOOR = 0.02  # nats a token
CLIPPED_SHARE = 0.5  # of the tokens; the published runs stay far below
GAP_LIMIT = 1e-3  # nats, of any one token's log-probability


def warnings(rows: Sequence[Row]) -> list[str]:
    """The sentences that hold after the last of `rows`, which are one stage's, oldest first.

    The newest `STEPS` rows decide, and rows of an evaluation alone do not count.
    """
    recent = [row for row in rows if _is_training(row)][-STEPS:]
    found = (monitor(recent) for monitor in MONITORS)
    return [text for text in found if text is not None]


def fatal(values: Row) -> str | None:
    """Why the run must stop at this step, or None: nothing sound can follow a non-finite loss."""
    for name in ("loss", "grad_norm", "critic/loss", "critic/grad_norm"):
        if name in values and not math.isfinite(values[name]):
            return (
                f"{name} is {values[name]}: the weights would be lost. Lower the learning rate "
                "or clip the gradient more tightly, and begin the stage again: --out NEW --after "
                "OLD keeps those before it"
            )
    return None


def no_contrast(recent: Sequence[Row]) -> str | None:
    """Group advantages are all 0, so nothing is learned."""
    if _lasts(recent, "equal_groups", lambda share: share >= 1):
        return (
            f"in every group all answers have had equal rewards for {STEPS} steps, so there is "
            "nothing to learn from: use easier problems if the reward is low and harder ones if "
            "it is high, larger groups, or a higher temperature"
        )
    return None


def no_reward(recent: Sequence[Row]) -> str | None:
    """Nothing is ever rewarded."""
    if _lasts(recent, "reward", lambda reward: reward == 0):
        return (
            f"the reward has been 0 for {STEPS} steps: read samples.jsonl to see whether answers "
            "are wrong or not recognised; start from easier problems, a better base model, or a "
            "reward for the format"
        )
    return None


def no_verdict(recent: Sequence[Row]) -> str | None:
    """The reward is a mean over no answers."""
    if _lasts(recent, "reward", math.isnan):
        return (
            f"no answer could be judged for {STEPS} steps: the reward function returns None or "
            "nan for all of them"
        )
    return None


def cut_off(recent: Sequence[Row]) -> str | None:
    """Answers do not end by themselves."""
    if _lasts(recent, "cut", lambda share: share >= CUT_SHARE):
        return (
            f"at least {CUT_SHARE:.0%} of the answers have been cut off at the length limit for "
            f"{STEPS} steps: raise max_new, or train the base model to end its answers"
        )
    return None


def no_entropy(recent: Sequence[Row]) -> str | None:
    """The policy has stopped to explore."""
    if _lasts(recent, "entropy", lambda nats: nats < ENTROPY_FLOOR):
        return (
            f"entropy has collapsed: below {ENTROPY_FLOOR} nats a token for {STEPS} steps, so "
            "answers to a problem hardly differ: lower the learning rate, raise clip_high or the "
            "temperature, or add a KL term"
        )
    return None


def much_clipping(recent: Sequence[Row]) -> str | None:
    """The policy runs away from the one that sampled."""
    if _lasts(recent, "clipped", lambda share: share > CLIPPED_SHARE):
        return (
            f"more than {CLIPPED_SHARE:.0%} of the tokens have been clipped for {STEPS} steps, "
            "so most of the gradient is thrown away: lower the learning rate, or make fewer "
            "updates from one rollout"
        )
    return None


def wide_gap(recent: Sequence[Row]) -> str | None:
    """Sampler and trainer are two policies. One step is enough: this is a fault, not chance."""
    # nan is a gap too, and smaller than nothing.
    if recent and "gap" in recent[-1] and not recent[-1]["gap"] <= GAP_LIMIT:
        return (
            f"log-probabilities of sampler and trainer differ by more than {GAP_LIMIT:g}: the "
            "policy that is trained is not the one that answered; compare their dtypes, masks "
            "and positions, and use float32 to tell rounding from a fault"
        )
    return None


MONITORS = (
    wide_gap,
    cut_off,
    no_verdict,
    no_reward,
    no_contrast,
    no_entropy,
    much_clipping,
)


class Span(NamedTuple):
    """A sentence that held from step `first` to step `last` of a stage."""

    stage: str
    first: int
    last: int
    text: str


def history(rows: Iterable[Row]) -> list[Span]:
    """When each warning, or the reason to stop, held in a whole run; in order of first steps."""
    spans: list[Span] = []
    for stage, group in groupby(rows, key=lambda row: row["stage"]):
        training = [row for row in group if _is_training(row)]
        now: dict[str, int] = {}  # sentence -> where its span is in the list
        for end, row in enumerate(training, 1):
            before, now = now, {}
            texts = warnings(training[max(0, end - STEPS) : end])
            texts += [text] if (text := fatal(row)) else []
            for text in texts:
                now[text] = before.get(text, len(spans))
                if text in before:
                    spans[now[text]] = spans[now[text]]._replace(last=row["step"])
                else:
                    spans.append(Span(stage, row["step"], row["step"], text))
    return spans


def _is_training(row: Row) -> bool:
    return "loss" in row or "reward" in row


def _lasts(recent: Sequence[Row], name: str, holds: Callable[[float], bool]) -> bool:
    return len(recent) == STEPS and all(name in row and holds(row[name]) for row in recent)
