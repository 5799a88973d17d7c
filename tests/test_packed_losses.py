"""Every loss against its paper's formula, written over a list of sequences in float64.

The same sequences are laid out in two ways: a pair to a row, and all in long rows in another
order, with holes in the answers, gaps between them and an empty row. Gradients are compared with
central differences of the paper's formula.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.algos import critics, distillation, kl, losses, preferences, ratios
from r1jax.types import Batch

FIELDS = (
    *("logp", "logp_old", "logp_rollout", "logp_ref", "advantage", "entropy"),
    *("value_old", "target", "weight", "label"),
)


@dataclass(frozen=True)
class Sequence:
    """Numbers of the masked tokens of one answer, and where they lie."""

    fields: dict[str, np.ndarray]  # [n] each
    label: float
    pair: int
    before: int  # tokens of the prompt
    holes: frozenset[int]  # an unmasked token stands before these masked ones

    @property
    def n(self) -> int:
        return len(self.fields["logp"])


def make_sequences(seed=0, pairs=4):
    rng = np.random.default_rng(seed)
    sequences = []
    for i in range(2 * pairs):
        n = int(rng.integers(1, 8))
        old = rng.normal(-1.2, 0.4, n)
        fields = {
            "logp": old + rng.normal(0, 0.4, n),
            "logp_old": old,
            "logp_rollout": old + rng.normal(0, 0.5, n),
            "logp_ref": old + rng.normal(0, 0.5, n),
            "advantage": np.full(n, rng.normal()),
            "entropy": rng.random(n),
            "value_old": rng.normal(size=n),
            "target": rng.normal(size=n),
            "weight": np.full(n, 1 / (2 * pairs * n)),
        }
        fields["label"] = np.full(n, 1.0 - i % 2)
        holes = frozenset(np.flatnonzero(rng.random(n) < 0.2).tolist())
        sequences.append(
            Sequence(fields, 1.0 - i % 2, i // 2, before=int(rng.integers(1, 4)), holes=holes)
        )
    return sequences


def lay_out(sequences, order, *, fill=0.0, target="target"):
    """Rows of sequences; `order` lists, for each row, the sequences in it.

    Gives log-probabilities, the batch, and where the masked tokens of each sequence lie. `fill`
    is what stands off the mask. All layouts of 8 sequences have one shape: one compilation.
    """
    shape = (len(order), 48)
    values = {name: np.full(shape, fill, np.float32) for name in FIELDS}
    whole = {name: np.zeros(shape, np.int32) for name in ("segment", "position", "pair")}
    mask, where = np.zeros(shape, bool), [[] for _ in sequences]
    for r, row in enumerate(order):
        t, pairs = 0, []
        for segment, index in enumerate(row, start=1):
            s, start = sequences[index], t
            if s.pair not in pairs:
                pairs.append(s.pair)
            t += s.before
            for i in range(s.n):
                t += i in s.holes
                mask[r, t] = True
                where[index].append((r, t))
                for name in FIELDS:
                    values[name][r, t] = s.fields[name][i]
                t += 1
            whole["segment"][r, start:t] = segment
            whole["pair"][r, start:t] = pairs.index(s.pair) + 1
            whole["position"][r, start:t] = np.arange(t - start)
    label = values.pop("label")
    values["target"] = values["target"] if target == "target" else label
    fields = {name: jnp.asarray(x) for name, x in {**values, **whole}.items()}
    logp = fields.pop("logp")
    batch = Batch(
        tokens=jnp.ones(shape, jnp.int32),
        mask=jnp.asarray(mask),
        num_tokens=jnp.asarray(mask.sum(), jnp.float32),
        kl_estimate=jnp.float32(0.15),
        **fields,
    )
    return logp, batch, where


APART = [[0, 1], [3, 2], [4, 5], [6, 7]]
TOGETHER = [[6, 2, 3, 7], [], [1, 5, 4, 0], []]

# ----------------------------------------------------------------- the papers' formulas
# Each gives the loss from the sequences, the numbers x being trained (one array for each) and
# `frozen`, the same numbers where no gradient flows.


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def paper_ratio(level, s, x, frozen, t):
    old = s.fields["logp_old"]
    if level == "token":
        return math.exp(x[t]) / math.exp(old[t])
    if level == "sequence":
        return (math.exp(sum(x)) / math.exp(sum(old))) ** (1 / s.n)
    if level == "sequence, per token":
        whole = (math.exp(sum(frozen)) / math.exp(sum(old))) ** (1 / s.n)
        return whole * math.exp(x[t]) / math.exp(frozen[t])
    assert level == "product"
    return math.exp(sum(x)) / math.exp(sum(old))


def paper_extras(s, x, t, *, estimate=None, weight=0.0, unbiased=False, entropy=0.0):
    total = 0.0
    if estimate:
        p, q = math.exp(x[t]), math.exp(s.fields["logp_ref"][t])
        term = {
            "k1": math.log(p / q),
            "k2": math.log(p / q) ** 2 / 2,
            "k3": q / p - math.log(q / p) - 1,
        }[estimate]
        total += weight * term * (p / math.exp(s.fields["logp_old"][t]) if unbiased else 1)
    return total - entropy * s.fields["entropy"][t]


def no_correction(s, t):
    return 1.0


def cut_at(cap, level="token"):
    def factor(s, t):
        gap = s.fields["logp_old"] - s.fields["logp_rollout"]
        gap = {"token": gap[t], "product": sum(gap), "sequence": sum(gap) / s.n}[level]
        return min(math.exp(gap), cap)

    return factor


def only_within(low, high, level="token"):
    def factor(s, t):
        value = cut_at(math.inf, level)(s, t)
        return value if low <= value <= high else 0.0

    return factor


def paper_policy(
    sequences, x, frozen, *, low=0.2, high=0.2, dual=None, level="token", factor=no_correction,
    **extras,
):  # fmt: skip
    total = 0.0
    for i, s in enumerate(sequences):
        for t in range(s.n):
            a, ratio = s.fields["advantage"][t], paper_ratio(level, s, x[i], frozen[i], t)
            objective = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            if dual and a < 0:
                objective = max(objective, dual * a)
            term = -factor(s, t) * objective + paper_extras(s, x[i], t, **extras)
            total += s.fields["weight"][t] * term
    return total


def paper_cispo(sequences, x, frozen, *, low, high, factor=no_correction, **extras):
    total = 0.0
    for i, s in enumerate(sequences):
        for t in range(s.n):
            ratio = math.exp(frozen[i][t]) / math.exp(s.fields["logp_old"][t])
            clipped = min(max(ratio, 1 - low), 1 + high)
            term = -factor(s, t) * clipped * s.fields["advantage"][t] * x[i][t]
            total += s.fields["weight"][t] * (term + paper_extras(s, x[i], t, **extras))
    return total


def paper_cross_entropy(sequences, x, frozen):
    return -sum(w * p for s, row in zip(sequences, x, strict=True)
                for w, p in zip(s.fields["weight"], row, strict=True))  # fmt: skip


def paper_value(sequences, x, frozen, *, clip):
    total = 0.0
    for s, row in zip(sequences, x, strict=True):
        for t in range(s.n):
            target, old = s.fields["target"][t], s.fields["value_old"][t]
            error = (row[t] - target) ** 2
            if clip is not None:
                error = max(error, (old + min(max(row[t] - old, -clip), clip) - target) ** 2)
            total += s.fields["weight"][t] * error / 2
    return total


def paper_implicit_prm(sequences, x, frozen, *, beta):
    total = 0.0
    for s, row in zip(sequences, x, strict=True):
        score = beta * sum(row - s.fields["logp_ref"])
        total -= s.label * log_sigmoid(score) + (1 - s.label) * log_sigmoid(-score)
    return total / len(sequences)


def paper_pointwise(sequences, x, frozen):
    total = 0.0
    for s, row in zip(sequences, x, strict=True):
        total -= s.label * log_sigmoid(row[-1]) + (1 - s.label) * log_sigmoid(-row[-1])
    return total / len(sequences)


def over_pairs(of_pair):
    """The mean over pairs of of_pair(better, x of it, worse, x of it)."""

    def paper(sequences, x, frozen, **settings):
        total = 0.0
        for i in range(0, len(sequences), 2):
            assert sequences[i].label == 1 and sequences[i].pair == sequences[i + 1].pair
            total += of_pair(sequences[i], x[i], sequences[i + 1], x[i + 1], **settings)
        return total / (len(sequences) / 2)

    return paper


@over_pairs
def paper_pairwise(better, x, worse, y, *, margin):
    return -log_sigmoid(x[-1] - y[-1] - margin)


@over_pairs
def paper_dpo(better, x, worse, y, *, beta, smoothing):
    h = sum(x - better.fields["logp_ref"]) - sum(y - worse.fields["logp_ref"])
    return -(1 - smoothing) * log_sigmoid(beta * h) - smoothing * log_sigmoid(-beta * h)


@over_pairs
def paper_ipo(better, x, worse, y, *, beta):
    h = sum(x - better.fields["logp_ref"]) - sum(y - worse.fields["logp_ref"])
    return (h - 1 / (2 * beta)) ** 2


@over_pairs
def paper_orpo(better, x, worse, y, *, weight):
    p, q = math.exp(np.mean(x)), math.exp(np.mean(y))
    odds_ratio = (p / (1 - p)) / (q / (1 - q))
    return -math.log(p) - weight * log_sigmoid(math.log(odds_ratio))


@over_pairs
def paper_simpo(better, x, worse, y, *, beta, gamma):
    return -log_sigmoid(beta / better.n * sum(x) - beta / worse.n * sum(y) - gamma)


def paper_kto(sequences, x, frozen, *, beta, desirable, undesirable):
    total, z = 0.0, 0.15
    for s, row in zip(sequences, x, strict=True):
        r = sum(row - s.fields["logp_ref"])
        if s.label:
            total += desirable * (1 - sigmoid(beta * (r - z)))
        else:
            total += undesirable * (1 - sigmoid(beta * (z - r)))
    return total / len(sequences)


CASES = {
    "grpo": (losses.policy_loss, paper_policy, {}),
    "dual clip": (
        partial(losses.policy_loss, clip_dual=1.3),
        paper_policy,
        {"dual": 1.3},
    ),
    "gspo": (
        partial(losses.policy_loss, ratio=ratios.by_sequence, clip_low=0.05, clip_high=0.08),
        paper_policy,
        {"level": "sequence", "low": 0.05, "high": 0.08},
    ),
    "gspo, token": (
        partial(losses.policy_loss, ratio=ratios.by_sequence_per_token, clip_low=0.05),
        paper_policy,
        {"level": "sequence, per token", "low": 0.05},
    ),
    "product": (
        partial(losses.policy_loss, ratio=ratios.by_product, clip_low=0.5, clip_high=0.5),
        paper_policy,
        {"level": "product", "low": 0.5, "high": 0.5},
    ),
    "truncated correction": (
        partial(losses.policy_loss, correction=partial(ratios.truncated, cap=1.2)),
        paper_policy,
        {"factor": cut_at(1.2)},
    ),
    "masked correction, kl in the loss": (
        partial(
            losses.policy_loss,
            correction=partial(ratios.masked, low=0.7, high=1.4),
            kl=kl.k3,
            kl_weight=0.3,
        ),
        paper_policy,
        {"factor": only_within(0.7, 1.4), "estimate": "k3", "weight": 0.3},
    ),
    "correction by sequence": (
        partial(
            losses.policy_loss,
            correction=partial(ratios.masked, low=0.8, high=1.2, ratio=ratios.by_sequence),
        ),
        paper_policy,
        {"factor": only_within(0.8, 1.2, "sequence")},
    ),
    "correction by product": (
        partial(
            losses.policy_loss,
            correction=partial(ratios.truncated, cap=1.5, ratio=ratios.by_product),
        ),
        paper_policy,
        {"factor": cut_at(1.5, "product")},
    ),
    "unbiased kl": (
        partial(losses.policy_loss, kl=kl.k3, kl_weight=0.5, kl_unbiased=True),
        paper_policy,
        {"estimate": "k3", "weight": 0.5, "unbiased": True},
    ),
    "k2 and an entropy bonus": (
        partial(losses.policy_loss, kl=kl.k2, kl_weight=0.2, entropy_weight=0.3),
        paper_policy,
        {"estimate": "k2", "weight": 0.2, "entropy": 0.3},
    ),
    "cispo": (
        partial(losses.cispo, clip_low=0.2, clip_high=0.3),
        paper_cispo,
        {"low": 0.2, "high": 0.3},
    ),
    "cispo with all": (
        partial(
            losses.cispo,
            clip_low=1.0,
            clip_high=0.1,
            correction=partial(ratios.truncated, cap=1.1),
            kl=kl.k1,
            kl_weight=0.2,
            entropy_weight=0.1,
        ),
        paper_cispo,
        {"low": 1.0, "high": 0.1, "factor": cut_at(1.1), "estimate": "k1", "weight": 0.2,
         "entropy": 0.1},
    ),
    "cross-entropy": (losses.cross_entropy, paper_cross_entropy, {}),
    "value": (partial(critics.value_loss, clip=None), paper_value, {"clip": None}),
    "clipped value": (partial(critics.value_loss, clip=0.3), paper_value, {"clip": 0.3}),
    "implicit prm": (
        partial(critics.implicit_prm_loss, beta=0.4),
        paper_implicit_prm,
        {"beta": 0.4},
    ),
    "pairwise": (partial(preferences.pairwise_loss, margin=0.2), paper_pairwise, {"margin": 0.2}),
    "pointwise": (preferences.pointwise_loss, paper_pointwise, {}),
    "dpo": (
        partial(preferences.dpo, beta=0.4, smoothing=0.1),
        paper_dpo,
        {"beta": 0.4, "smoothing": 0.1},
    ),
    "ipo": (partial(preferences.ipo, beta=0.3), paper_ipo, {"beta": 0.3}),
    "orpo": (partial(preferences.orpo, weight=0.5), paper_orpo, {"weight": 0.5}),
    "simpo": (
        partial(preferences.simpo, beta=2.0, gamma=0.3),
        paper_simpo,
        {"beta": 2.0, "gamma": 0.3},
    ),
    "kto": (
        partial(preferences.kto, beta=0.5, desirable=1.5, undesirable=0.7),
        paper_kto,
        {"beta": 0.5, "desirable": 1.5, "undesirable": 0.7},
    ),
}  # fmt: skip
LABELLED = {"implicit prm", "pairwise", "pointwise", "dpo", "ipo", "orpo", "simpo", "kto"}
EVERY = pytest.mark.parametrize("name", CASES)


def laid_out(name, order, *, sequences=None, fill=0.0):
    target = "label" if name in LABELLED else "target"
    return lay_out(sequences or make_sequences(), order, fill=fill, target=target)


@cache
def stepped(name):
    """The jitted function (logp, batch) -> ((loss, metrics), gradient)."""
    return jax.jit(jax.value_and_grad(CASES[name][0], has_aux=True))


def differences(function, x, step=1e-6):
    """The gradient of function(x, frozen) with respect to x, an array for each sequence."""
    gradient = [np.zeros_like(row) for row in x]
    for i, row in enumerate(x):
        for t in range(len(row)):
            moved = [[r.copy() for r in x] for _ in range(2)]
            moved[0][i][t] += step
            moved[1][i][t] -= step
            gradient[i][t] = (function(moved[0], x) - function(moved[1], x)) / (2 * step)
    return gradient


@EVERY
def test_a_loss_and_its_gradient_are_those_of_the_paper_however_rows_are_packed(name):
    _, paper, settings = CASES[name]
    sequences = make_sequences()
    x = [s.fields["logp"] for s in sequences]
    expected = paper(sequences, x, x, **settings)
    slopes = differences(lambda x, frozen: paper(sequences, x, frozen, **settings), x)
    metrics = []
    for order in (APART, TOGETHER):
        logp, batch, where = laid_out(name, order)
        (value, found), gradient = stepped(name)(logp, batch)
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6)
        assert value == found["loss"]
        for slope, places in zip(slopes, where, strict=True):
            got = [float(gradient[place]) for place in places]
            np.testing.assert_allclose(got, slope, rtol=1e-4, atol=2e-6)
        metrics.append(found)
    chex.assert_trees_all_close(*metrics, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
@EVERY
def test_nothing_is_read_where_the_mask_is_false(name, garbage):
    logp, batch, _ = laid_out(name, TOGETHER)
    expected = stepped(name)(logp, batch)
    dirty_logp, dirty, _ = laid_out(name, TOGETHER, fill=garbage)
    assert not np.array_equal(dirty_logp, logp)
    got = stepped(name)(dirty_logp, dirty)
    chex.assert_trees_all_equal(got, expected)
    np.testing.assert_array_equal(np.asarray(got[1])[~np.asarray(batch.mask)], 0.0)


@EVERY
def test_micro_batches_add_up_to_the_whole_update(name):
    logp, batch, _ = laid_out(name, APART)
    (_, metrics), gradient = stepped(name)(logp, batch)
    parts = []
    for order in ([APART[0], [], [], []], [[], *APART[1:]]):
        logp, part, _ = laid_out(name, order)
        parts.append(stepped(name)(logp, replace(part, num_tokens=batch.num_tokens)))
    total = parts[0][1] + parts[1][1]
    np.testing.assert_allclose(total, gradient, rtol=1e-6, atol=1e-9)
    for measure, value in metrics.items():
        total = sum(float(found[measure]) for (_, found), _ in parts)
        np.testing.assert_allclose(total, value, rtol=1e-5, atol=1e-6, err_msg=measure)


@EVERY
def test_rows_without_a_masked_token_give_zero(name):
    logp, batch, _ = laid_out(name, APART)
    nothing = replace(batch, mask=jnp.zeros_like(batch.mask), num_tokens=jnp.zeros(()))
    (value, metrics), gradient = stepped(name)(logp, nothing)
    assert value == 0 and all(x == 0 for x in metrics.values())
    np.testing.assert_array_equal(gradient, 0.0)


# ----------------------------------------------------------------- more on single losses


def test_gspo_and_gspo_token_agree_where_the_advantage_is_that_of_the_answer():
    logp, batch, _ = laid_out("gspo", TOGETHER)
    results = [
        jax.value_and_grad(
            partial(losses.policy_loss, ratio=ratio, clip_low=0.05, clip_high=0.08), has_aux=True
        )(logp, batch)
        for ratio in (ratios.by_sequence, ratios.by_sequence_per_token)
    ]
    np.testing.assert_allclose(results[0][0][0], results[1][0][0], rtol=1e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("ratio", "expected", "slope", "clipped"),
    [
        (1.1, 2.2, 2.2, 0),
        (2.9, 5.8, 5.8, 0),
        (3.5, 6.0, 0.0, 1),  # held at 3 * 2
        (0.5, 1.6, 0.0, 1),  # the ordinary clip at 0.8
    ],
)
def test_the_dual_clip_of_one_bad_token_worked_by_hand(ratio, expected, slope, clipped):
    sequence = Sequence({name: np.zeros(1) for name in FIELDS}, 1.0, 0, before=1, holes=frozenset())
    sequence.fields.update(
        logp=np.array([math.log(ratio)]), advantage=np.array([-2.0]), weight=np.ones(1)
    )
    logp, batch, [[place]] = lay_out([sequence], [[0]])
    loss = partial(losses.policy_loss, clip_dual=3.0)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logp, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[place], slope, rtol=1e-6)
    assert metrics["clipped"] == clipped
    good = replace(batch, advantage=-batch.advantage)
    assert losses.policy_loss(logp, good) == loss(logp, good)  # a good token's metrics too


def test_cispo_keeps_the_gradient_of_the_tokens_that_clipping_drops():
    logp, batch, _ = laid_out("cispo", APART)
    clipped, kept = (
        np.asarray(jax.grad(lambda x, loss=loss: loss(x, batch)[0])(logp))
        for loss in (losses.policy_loss, losses.cispo)
    )
    mask = np.asarray(batch.mask)
    assert (clipped[mask] == 0).any()
    assert (kept[mask] != 0).all()
    same = (clipped != 0) & mask
    np.testing.assert_allclose(kept[same], clipped[same], rtol=1e-5)


def test_the_entropy_bonus_pushes_each_masked_tokens_entropy_up_by_its_weight():
    logp, batch, _ = laid_out("grpo", APART)
    for loss in (losses.policy_loss, losses.cispo):
        gradient = jax.grad(
            lambda h, loss=loss: loss(logp, replace(batch, entropy=h), entropy_weight=0.01)[0]
        )(batch.entropy)
        expected = jnp.where(batch.mask, -0.01 * batch.weight, 0.0)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_weights_of_terms_can_be_traced():
    logp, batch, _ = laid_out("grpo", APART)
    numbers = {"kl_weight": 0.1, "entropy_weight": 0.2, "clip_low": 0.1, "clip_high": 0.3}
    for loss in (losses.policy_loss, losses.cispo):
        plain, _ = loss(logp, batch, kl=kl.k3, **numbers)
        traced = jax.jit(lambda numbers, loss=loss: loss(logp, batch, kl=kl.k3, **numbers)[0])
        np.testing.assert_allclose(traced(numbers), plain, rtol=1e-6)


def test_corrections_report_their_mean():
    logp, batch, _ = laid_out("grpo", APART)
    _, metrics = losses.policy_loss(logp, batch, correction=partial(ratios.truncated, cap=1.2))
    mask = np.asarray(batch.mask)
    gap = np.asarray(batch.logp_old, np.float64) - np.asarray(batch.logp_rollout, np.float64)
    expected = np.minimum(np.exp(gap[mask]), 1.2).mean()
    np.testing.assert_allclose(metrics["correction"], expected, rtol=1e-5)


POLICY = jnp.array([0.3, -0.9, 1.2, 0.1, -0.4])
OLD = jnp.array([0.1, -0.4, 0.9, 0.6, -0.8])
REFERENCE = jnp.array([-0.2, 0.5, 0.9, -0.3, 0.4])


@pytest.mark.parametrize("estimate", [kl.k1, kl.k3])
def test_the_unbiased_kl_term_has_the_gradient_of_the_kl_for_samples_of_an_old_policy(estimate):
    """Every token once, weighted with its probability under the old policy: an exact mean."""

    def term(logits):
        batch = Batch(
            tokens=jnp.ones((1, 5), jnp.int32),
            position=jnp.arange(5)[None],
            segment=jnp.ones((1, 5), jnp.int32),
            mask=jnp.ones((1, 5), bool),
            weight=jax.nn.softmax(OLD)[None],
            num_tokens=jnp.float32(5),
            advantage=jnp.zeros((1, 5)),
            logp_old=jax.nn.log_softmax(OLD)[None],
            logp_ref=jax.nn.log_softmax(REFERENCE)[None],
        )
        logp = jax.nn.log_softmax(logits)[None]
        return losses.policy_loss(logp, batch, kl=estimate, kl_weight=1.0, kl_unbiased=True)[0]

    def exact(logits):
        p, q = jax.nn.softmax(logits), jax.nn.softmax(REFERENCE)
        return jnp.sum(p * (jnp.log(p) - jnp.log(q)))

    np.testing.assert_allclose(term(POLICY), exact(POLICY), rtol=1e-5)
    np.testing.assert_allclose(
        jax.grad(term)(POLICY), jax.grad(exact)(POLICY), rtol=1e-4, atol=1e-6
    )


def test_a_ratio_too_large_for_float32_gives_no_nan():
    logp, batch, _ = laid_out("grpo", APART)
    for ratio in (ratios.by_token, ratios.by_sequence, ratios.by_product):
        for gap in (1e4, -1e4):
            far = replace(batch, logp_old=batch.logp_old + gap)
            loss = partial(
                losses.policy_loss, ratio=ratio, correction=ratios.truncated, clip_dual=3.0
            )
            (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(logp, far)
            assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["orpo", "simpo", "dpo", "kto", "implicit prm"])
def test_texts_that_are_certain_or_impossible_give_no_nan(name):
    _, batch, _ = laid_out(name, APART)
    for value in (0.0, -1e4):
        logp = jnp.full(batch.mask.shape, value)
        (loss, metrics), gradient = stepped(name)(logp, batch)
        assert np.isfinite(loss) and np.isfinite(gradient).all()
        assert all(np.isfinite(x) for x in metrics.values())


def test_metrics_of_pairs_are_means_over_pairs():
    sequences = make_sequences()
    logp, batch, _ = laid_out("dpo", TOGETHER)
    gaps = []
    for i in range(0, len(sequences), 2):
        a, b = sequences[i].fields, sequences[i + 1].fields
        gaps.append(0.3 * (sum(a["logp"] - a["logp_ref"]) - sum(b["logp"] - b["logp_ref"])))
    _, metrics = preferences.dpo(logp, batch, beta=0.3)
    np.testing.assert_allclose(metrics["margin"], np.mean(gaps), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(np.array(gaps) > 0), rtol=1e-6)
    _, metrics = preferences.orpo(logp, batch)
    surprise = np.mean([-s.fields["logp"].mean() for s in sequences[::2]])
    np.testing.assert_allclose(metrics["surprise"], surprise, rtol=1e-5)


def test_ktos_reference_point_is_the_mean_log_ratio_of_the_texts():
    sequences = make_sequences()
    expected = [sum(s.fields["logp"] - s.fields["logp_ref"]) for s in sequences]
    logp, batch, _ = laid_out("kto", TOGETHER, fill=math.nan)
    total, count = preferences.kto_reference_point(logp, batch)
    np.testing.assert_allclose(total, sum(expected), rtol=1e-5)
    assert count == len(sequences)


def test_no_gradient_flows_through_ktos_reference_point():
    logp, batch, _ = laid_out("kto", APART)
    gradient = jax.grad(lambda z: preferences.kto(logp, replace(batch, kl_estimate=z))[0])(
        jnp.float32(0.1)
    )
    assert gradient == 0


def test_a_reward_model_is_read_at_the_last_token_only():
    for name in ("pairwise", "pointwise"):
        logp, batch, where = laid_out(name, TOGETHER)
        gradient = jax.grad(lambda x, name=name, batch=batch: CASES[name][0](x, batch)[0])(logp)
        last = np.zeros(batch.mask.shape, bool)
        for places in where:
            last[places[-1]] = True
        np.testing.assert_array_equal(np.asarray(gradient) != 0, last)


def test_distillation_sums_divergences_by_weight():
    divergence, batch, _ = laid_out("grpo", TOGETHER, fill=math.nan)
    loss, metrics = distillation.distillation_loss(divergence, batch)
    expected = sum(s.fields["weight"] @ s.fields["logp"] for s in make_sequences())
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics == {"loss": loss}


@pytest.mark.parametrize(
    ("loss", "without", "message"),
    [
        (losses.cispo, "advantage", "cispo needs advantage"),
        (partial(losses.policy_loss, correction=ratios.truncated), "logp_rollout", "correction"),
        (partial(losses.policy_loss, correction=ratios.masked), "logp_old", "correction"),
        (partial(losses.policy_loss, entropy_weight=0.1), "entropy", "entropy"),
        (partial(losses.policy_loss, kl_unbiased=True), "entropy", "needs kl"),
        (partial(losses.policy_loss, clip_dual=1.0), "entropy", "clip_dual must be > 1"),
        (critics.value_loss, "target", "target=None"),
        (critics.value_loss, "value_old", "value_old"),
        (critics.implicit_prm_loss, "logp_ref", "target and logp_ref"),
        (preferences.pairwise_loss, "pair", "needs pair"),
        (preferences.pairwise_loss, "target", "needs target"),
        (preferences.pointwise_loss, "target", "labels"),
        (preferences.dpo, "logp_ref", "logp_ref=None"),
        (preferences.kto, "kl_estimate", "target and kl_estimate"),
    ],
)
def test_a_batch_that_lacks_what_the_loss_needs_is_refused(loss, without, message):
    logp, batch, _ = laid_out("grpo", APART)
    with pytest.raises(ValueError, match=message):
        loss(logp, replace(batch, **{without: None}))
