"""What k answers to a problem are worth, estimated from n >= k of them."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import groupby


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n answers, c of which are right, hold a right one.

    The k are drawn without replacement, each set of k being as likely as any other, which makes
    this an unbiased estimate of the chance for k fresh answers: 1 - C(n - c, k) / C(n, k).

    Raises:
      ValueError: not 0 <= c <= n, or not 1 <= k <= n.

    Source: Evaluating Large Language Models Trained on Code, arXiv:2107.03374, equation 1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"need 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# --------------------------------------------------------------------------- votes


def majority_at_k(votes: Sequence[Hashable | None], right: Sequence[float], k: int) -> float:
    """The mean accuracy of the answer that a majority of k of these answers elects.

    Answer i votes for `votes[i]`; None abstains. Of k answers, the vote that most of them give
    wins, and one of those that gave it is handed in. The result is the exact mean over all sets of
    k of the n answers, over which of several equally frequent votes wins, and over which of its
    voters is handed in, all equally likely: so it does not depend on the order of the answers, and
    is an unbiased estimate for k fresh ones. Where all k abstain the result is wrong.

    Raises:
      ValueError: `votes` and `right` differ in length, or not 1 <= k <= n.

    Source: the vote is that of self-consistency, arXiv:2203.11171.
    """
    n = len(votes)
    if len(right) != n or not 1 <= k <= n:
        raise ValueError(
            f"need as many votes as verdicts and 1 <= k <= n, "
            f"got {n} votes, {len(right)} verdicts, k={k}"
        )
    counts = Counter(vote for vote in votes if vote is not None)
    total = Fraction(0)
    for vote, count in counts.items():
        good = sum(_exact(r) for v, r in zip(votes, right, strict=True) if v == vote)
        if good:
            others = sorted(other for name, other in counts.items() if name != vote)
            wins = _sets_won(count, tuple(others), n - counts.total(), k)
            total += wins * good / count
    return float(total / math.comb(n, k))


@lru_cache(maxsize=1 << 16)  # most problems of a file share a few ways to be split
def _sets_won(count: int, others: tuple[int, ...], abstaining: int, k: int) -> Fraction:
    """How many sets of k answers a vote given `count` times wins; shared with t others: 1/(t + 1).

    `others` holds how often each other vote was given.
    """
    won = Fraction(0)
    for height in range(1, min(count, k) + 1):  # how many of the k give this vote
        # Votes given fewer times cannot reach `height`: they are free, like abstentions.
        free = abstaining + sum(other for other in others if other < height)
        ways = Counter({(0, 0): 1})  # (answers taken from rivals, rivals that tie) -> sets
        for rival in (other for other in others if other >= height):
            longer: Counter[tuple[int, int]] = Counter()
            for (taken, ties), sets in ways.items():
                for more in range(min(height, k - height - taken) + 1):
                    tied = ties + (more == height)
                    longer[taken + more, tied] += sets * math.comb(rival, more)
            ways = longer
        for (taken, ties), sets in ways.items():
            rest = math.comb(free, k - height - taken)
            won += Fraction(math.comb(count, height) * sets * rest, ties + 1)
    return won


def weighted_at_k(
    votes: Sequence[Hashable | None], weights: Sequence[float], right: Sequence[float], k: int
) -> float:
    """The mean accuracy of the vote with the largest sum of weights among k answers.

    As `majority_at_k`, but the mean is over the n // k blocks of k answers that follow each
    other, as there is no short sum over all sets; the remainder is left out. Where all abstain,
    or the heaviest sum is 0, the result is wrong.

    Raises:
      ValueError: the lists differ in length, not 1 <= k <= n, or a weight is not finite and >= 0.

    Source: weighted voting with a verifier's scores, arXiv:2206.02336.
    """
    n = len(votes)
    if not len(weights) == len(right) == n or not 1 <= k <= n:
        raise ValueError(
            f"need as many votes as weights and verdicts and 1 <= k <= n, "
            f"got {n} votes, {len(weights)} weights, {len(right)} verdicts, k={k}"
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"a vote's weight must be finite and >= 0, got {weight!r}")
    blocks = [range(start, start + k) for start in range(0, n - k + 1, k)]
    return sum(_heaviest(votes, weights, right, block) for block in blocks) / len(blocks)


def _heaviest(
    votes: Sequence[Hashable | None],
    weights: Sequence[float],
    right: Sequence[float],
    block: Sequence[int],
) -> float:
    members: dict[Hashable, list[int]] = {}
    for i in block:
        if votes[i] is not None:
            members.setdefault(votes[i], []).append(i)
    # fsum: equal votes tie whatever order their weights are added in.
    sums = {vote: math.fsum(weights[i] for i in voters) for vote, voters in members.items()}
    top = max(sums.values(), default=0.0)
    if not top:
        return 0.0
    winners = [vote for vote, total in sums.items() if total == top]
    shares = [sum(right[i] for i in members[vote]) / len(members[vote]) for vote in winners]
    return sum(shares) / len(winners)


# --------------------------------------------------------------------------- scores


def best_at_k(scores: Sequence[float], right: Sequence[float], k: int) -> float:
    """The mean accuracy of the answer with the highest score among k of these answers.

    The exact mean over all sets of k of the n answers and, where several have the highest score,
    over these: an unbiased estimate for k fresh answers.

    Raises:
      ValueError: `scores` and `right` differ in length, not 1 <= k <= n, or a score is nan.

    Source: best-of-N with a verifier, arXiv:2110.14168.
    """
    n = len(scores)
    if len(right) != n or not 1 <= k <= n:
        raise ValueError(
            f"need as many scores as verdicts and 1 <= k <= n, "
            f"got {n} scores, {len(right)} verdicts, k={k}"
        )
    if any(math.isnan(score) for score in scores):
        raise ValueError(f"a score must be a number, got {list(scores)!r:.80}")
    total, above = Fraction(0), 0
    ranked = sorted(zip(scores, right, strict=True), reverse=True)
    for _, tied in groupby(ranked, key=lambda pair: pair[0]):
        values = [_exact(value) for _, value in tied]
        # Sets with none of those above, and some of these.
        sets = math.comb(n - above, k) - math.comb(n - above - len(values), k)
        if any(values):
            total += Fraction(sets * sum(values), len(values))
        above += len(values)
    return float(total / math.comb(n, k))


def _exact(value: float) -> int | Fraction:
    return int(value) if value in (0, 1) else Fraction(value)
