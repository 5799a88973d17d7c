"""Strategies against hand-made policies, for which the best answer is known by brute force."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest

from r1jax.search.beam import beam_search
from r1jax.search.budget import Forcing, budget_forcing
from r1jax.search.paths import (
    Meter,
    Path,
    as_probability,
    by_likelihood,
    by_rollouts,
    by_text,
    checked,
    distinct,
    metered,
    metered_value,
)
from r1jax.search.tree import tree_search

DEPTH = 3
LETTERS = "abc"
END = 0


def roots(count: int) -> list[Path]:
    return [Path(problem=i, prompt=f"problem {i}") for i in range(count)]


def spell(path: Path, letters: str, logp: float = 0.0) -> Path:
    """The path with letters behind it, each a token; a word of DEPTH letters is finished."""
    text = path.text + letters
    tokens = (*path.tokens, *map(ord, letters))
    return replace(
        path, text=text, tokens=tokens, logp=path.logp + logp, finished=len(text) >= DEPTH
    )


class Speller:
    """Continues a path with all letters in turn, from the first; counts its calls."""

    def __init__(self):
        self.calls: list[list[str]] = []

    def __call__(self, paths, *, samples, turn, until=None, limit=None):
        assert all(path.open for path in paths)
        assert [path.problem for path in paths] == sorted(path.problem for path in paths)
        self.calls.append([path.text for path in paths])
        found = []
        for path in paths:
            if until is None:  # to the end
                left = DEPTH - len(path.text)
                words = ["".join(word) for word in product(LETTERS, repeat=left)][:samples]
                found.append([spell(path, word) for word in words])
            else:
                steps = [LETTERS[i % len(LETTERS)] for i in range(samples)]
                found.append([spell(path, letter) for letter in steps])
        return found


def table(seed: int, *, inner: bool = True) -> dict[str, float]:
    """A value from 0 to 1 for every word and, with `inner`, for every beginning of one."""
    rng = random.Random(seed)
    sizes = range(1, DEPTH + 1) if inner else [DEPTH]
    return {"".join(w): rng.random() for size in sizes for w in product(LETTERS, repeat=size)}


def by_tables(tables: Sequence[dict[str, float]]) -> Callable[[Sequence[Path]], list[float]]:
    return lambda paths: [tables[path.problem][path.text] for path in paths]


def whole(values: dict[str, float]) -> list[str]:
    return [word for word in values if len(word) == DEPTH]


# --------------------------------------------------------------------------- beams


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_beam_keeps_the_best_of_all_continuations_of_what_it_kept(width: int):
    tables = [table(seed) for seed in range(5)]
    sample = Speller()
    found = beam_search(
        sample, by_tables(tables), roots(5), width=width, branch=len(LETTERS), until="."
    )
    for values, each in zip(tables, found, strict=True):
        beam = [""]
        for _ in range(DEPTH):
            ways = [text + letter for text in beam for letter in LETTERS]
            beam = sorted(ways, key=lambda text: -values[text])[:width]
        assert each.chosen.text == beam[0]
    assert len(sample.calls) == DEPTH  # the steps of all problems are taken together


def test_a_beam_as_wide_as_all_words_finds_the_best_and_a_narrow_one_is_led_astray():
    tables = [table(seed) for seed in range(20)]
    best = [max(whole(values), key=lambda word: values[word]) for values in tables]

    def hits(width: int) -> int:
        found = beam_search(
            Speller(), by_tables(tables), roots(20), width=width, branch=3, until="."
        )
        return sum(a.chosen.text == b for a, b in zip(found, best, strict=True))

    assert hits(len(LETTERS) ** DEPTH) == 20
    assert hits(1) < 20
    # What a beam gives a problem does not depend on the other problems.
    alone = beam_search(Speller(), by_tables(tables), [roots(20)[7]], width=2, branch=3, until=".")
    among = beam_search(Speller(), by_tables(tables), roots(20), width=2, branch=3, until=".")
    assert alone[0] == among[7]


def test_a_finished_answer_stays_in_the_beam_while_others_go_on():
    ended = {"a": True, "b": False, "ba": True, "bb": True}

    def sample(paths, *, samples, turn, until=None, limit=None):
        return [[replace(spell(p, x), finished=ended[p.text + x]) for x in "ab"] for p in paths]

    values = {"a": 0.6, "b": 0.7, "ba": 0.5, "bb": 0.4}
    (found,) = beam_search(
        sample, lambda ps: [values[p.text] for p in ps], roots(1), width=2, branch=2, until="."
    )
    assert found.chosen.text == "a"
    assert [path.text for path in found.candidates] == ["a", "ba", "bb"]


def test_without_a_scorer_the_beam_follows_the_likelihood():
    def sample(paths, *, samples, turn, until=None, limit=None):
        odds = {"a": math.log(0.6), "b": math.log(0.4)}
        after_a = {"a": math.log(0.3), "b": math.log(0.3)}  # and 0.4 for what is not sampled
        return [
            [spell(p, x, (after_a if p.text[:1] == "a" else odds)[x]) for x in "ab"] for p in paths
        ]

    (greedy,) = beam_search(sample, by_likelihood, roots(1), width=1, branch=2, until=".")
    (wide,) = beam_search(sample, by_likelihood, roots(1), width=4, branch=2, until=".")
    assert greedy.chosen.text == "aaa"  # 0.6 * 0.3 * 0.3
    assert wide.chosen.text == "baa"  # 0.4 * 0.6 * 0.6


def test_an_answer_that_ran_out_of_room_is_handed_in_only_if_none_ended():
    def sample(paths, *, samples, turn, until=None, limit=None):
        return [[replace(spell(p, "a"), cut=True), replace(spell(p, "b"), finished=p.problem == 0,
                 cut=p.problem == 1)] for p in paths]  # fmt: skip

    found = beam_search(
        sample, lambda ps: [-float(ord(p.text)) for p in ps], roots(2), width=2, branch=2, until="."
    )
    assert [each.chosen.text for each in found] == ["b", "a"]


# --------------------------------------------------------------------------- trees


def test_a_tree_that_has_been_seen_whole_gives_the_best_word_and_asks_for_no_more():
    tables = [table(seed) for seed in range(6)]
    sample = Speller()
    # 1 + 3 + 9 nodes have children.
    found = tree_search(sample, by_tables(tables), roots(6), rounds=50, branch=3, until=".")
    for values, each in zip(tables, found, strict=True):
        best = max(whole(values), key=lambda word: values[word])
        assert each.chosen.text == best
        assert sorted(path.text for path in each.candidates) == sorted(whole(values))
    assert len(sample.calls) == 13 and all(len(call) == 6 for call in sample.calls)


def uct(values: dict[str, float], rounds: int, explore: float) -> list[str]:
    """The search written down again, on texts: all that is valued in so many rounds."""
    seen: list[str] = []

    def children(text: str) -> list[str]:
        return [each for each in seen if each != text and each[:-1] == text]

    def complete(text: str) -> bool:
        below = children(text)
        return len(text) == DEPTH or (bool(below) and all(map(complete, below)))

    def bound(child: str) -> float:
        below = [each for each in seen if each.startswith(child)]
        above = [each for each in seen if each.startswith(child[:-1])]
        mean = sum(values[each] for each in below) / len(below)
        return mean + explore * math.sqrt(math.log(len(above)) / len(below))

    for _ in range(rounds):
        text = ""
        while children(text):
            text = max((each for each in children(text) if not complete(each)), key=bound)
        seen += [text + letter for letter in LETTERS]
    return seen


@pytest.mark.parametrize("seed", range(6))
def test_each_round_walks_to_where_the_upper_bound_is_highest(seed: int):
    values = table(seed)
    for rounds in range(1, 13):
        (found,) = tree_search(
            Speller(),
            by_tables([values]),
            roots(1),
            rounds=rounds,
            branch=3,
            until=".",
            explore=0.3,
        )
        words = [text for text in uct(values, rounds, 0.3) if len(text) == DEPTH]
        if words:
            assert sorted(path.text for path in found.candidates) == sorted(words)
            assert found.chosen.text == max(words, key=lambda word: values[word])


def test_a_tree_finds_the_way_that_a_greedy_beam_leaves_at_the_first_step():
    values = dict.fromkeys(table(0), 0.1)
    values |= {"a": 0.6, "b": 0.5, "bca": 1.0}
    (greedy,) = beam_search(Speller(), by_tables([values]), roots(1), width=1, branch=3, until=".")
    (found,) = tree_search(Speller(), by_tables([values]), roots(1), rounds=12, branch=3, until=".")
    assert greedy.chosen.text[0] == "a" and found.chosen.text == "bca"


def test_a_tree_without_a_whole_answer_continues_its_best_node_to_the_end():
    values = table(1)
    (found,) = tree_search(
        Speller(), by_tables([values]), roots(1), rounds=1, branch=3, until=".",
    )  # fmt: skip
    best = max(LETTERS, key=lambda letter: values[letter])
    assert found.chosen.text == best + "aa" and found.candidates == [found.chosen]


def test_no_node_lies_deeper_than_the_limit():
    sample = Speller()
    tree_search(
        sample, by_tables([table(0)]), roots(1), rounds=50, branch=3, until=".", max_depth=2
    )
    steps = [texts for texts in sample.calls[:-1]]
    assert len(steps) == 1 + 3 and max(len(text) for (text,) in steps) == 1


def test_a_node_is_worth_the_mean_of_its_rollouts():
    values = table(3, inner=False)
    estimate = by_rollouts(Speller(), by_tables([values]), samples=len(LETTERS))
    ended = spell(roots(1)[0], "cab")
    found = estimate([spell(roots(1)[0], "ab"), ended])
    assert found == pytest.approx([sum(values[f"ab{x}"] for x in LETTERS) / 3, values["cab"]])


# --------------------------------------------------------------------------- budgets


def thinker(*, room: int = 40, ends: Sequence[int] = (3,)):
    """A model that closes its thinking at its n-th thought, n of `ends` in turn, then answers."""

    def longer(path: Path, words: Sequence[str], finished: bool) -> Path:
        words = words[: room - len(path.tokens)]
        tokens = (*path.tokens, *(hash_of(word) for word in words))
        cut = not finished and len(tokens) >= room
        return replace(
            path, text=path.text + "".join(words), tokens=tokens, finished=finished, cut=cut
        )

    def sample(paths, *, samples, turn, until=None, limit=None):
        found = []
        for path in paths:
            if until is None:
                found.append([longer(path, ["A", "."], True)])
                continue
            end = ends[min(path.text.count("Wait"), len(ends) - 1)]
            words = [*(str(i % 10) for i in range(end - 1)), "</think>"][:limit]
            found.append([longer(path, words, False)])
        return found

    def force(path, text, *, drop=0):
        kept = path.tokens[: len(path.tokens) - drop]
        tokens = (*kept, hash_of(text))
        words = "".join(WORDS[token] for token in tokens)
        return replace(path, text=words, tokens=tokens, finished=False, cut=len(tokens) >= room)

    return sample, force


WORDS: dict[int, str] = {}


def hash_of(word: str) -> int:
    number = sum(ord(letter) << (5 * i) for i, letter in enumerate(word))
    WORDS[number] = word
    return number


@pytest.mark.parametrize(
    ("budget", "waits", "text"),
    [
        (9, 0, "01</think>A."),  # left alone
        (3, 0, "01</think>A."),  # just in time
        (2, 0, "01<cut>A."),
        (1, 0, "0<cut>A."),
        (0, 3, "<cut>A."),  # no thinking at all
        (9, 1, "01Wait01</think>A."),
        (9, 2, "01Wait01Wait01</think>A."),
        (7, 2, "01Wait01Wait0<cut>A."),
        (6, 2, "01Wait01<cut>A."),  # there is no room for a thought after the second wait
        (5, 2, "01Wait01<cut>A."),
    ],
)
def test_thinking_is_cut_at_its_budget_and_made_to_go_on(budget: int, waits: int, text: str):
    sample, force = thinker()
    how = Forcing(close="</think>", closing="<cut>", wait="Wait", budget=budget, waits=waits)
    found = budget_forcing(sample, force, roots(2), how=how)
    assert [each.chosen.text for each in found] == [text, text]
    assert all(each.chosen.finished for each in found)


def test_an_answer_that_ends_without_closing_its_thoughts_is_made_to_go_on_as_well():
    calls = []

    def sample(paths, *, samples, turn, until=None, limit=None):
        calls.append([path.text for path in paths])
        return [[replace(spell(path, "x!"), finished=True)] for path in paths]

    def force(path, text, *, drop=0):
        tokens = (*path.tokens[: len(path.tokens) - drop], *map(ord, text))
        return replace(path, text="".join(map(chr, tokens)), tokens=tokens, finished=False)

    how = Forcing(closing="|", wait="w", budget=9, waits=1)
    (found,) = budget_forcing(sample, force, roots(1), how=how)
    assert found.chosen.text == "xwx!" and calls == [[""], ["xw"]]


def test_an_answer_that_runs_out_of_room_is_left_as_it_is():
    sample, force = thinker(room=2)
    how = Forcing(closing="<cut>", budget=9, waits=2)
    (found,) = budget_forcing(sample, force, roots(1), how=how)
    assert found.chosen.text == "01" and found.chosen.cut and not found.chosen.open


# --------------------------------------------------------------------------- scores and cost


def test_scorers_see_prompts_and_answers_and_must_give_a_number_for_each():
    path = spell(roots(1)[0], "ab")
    value = by_text(
        lambda prompts, answers: [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]
    )
    assert value([path]) == [len("problem 0") + 2]
    with pytest.raises(ValueError, match="must give 2 finite numbers"):
        checked([1.0], 2)
    with pytest.raises(ValueError, match="must give 1 finite numbers"):
        by_text(lambda prompts, answers: [math.nan])([path])
    odds = as_probability(lambda prompts, answers: [0.0, math.log(3), -5000.0, 5000.0])
    assert odds([], []) == pytest.approx([0.5, 0.75, 0.0, 1.0])


def test_the_meter_counts_what_is_dropped_too():
    meter = Meter()
    values = by_tables([table(0)])
    beam_search(
        metered(Speller(), meter), metered_value(values, meter), roots(1),
        width=1, branch=3, until=".",
    )  # fmt: skip
    assert meter.sampled == 3 * 3 and meter.by_problem == {0: 9}  # one letter each
    assert meter.read == 0 + 1 + 2
    assert meter.scored == 3 * (1 + 2 + 3)


def test_equal_paths_count_once_and_the_first_stays():
    one, two = spell(roots(1)[0], "a", 0.1), spell(roots(1)[0], "a", 0.2)
    other = spell(roots(1)[0], "b")
    assert distinct([one, other, two]) == [one, other]


@pytest.mark.parametrize("change", [{"width": 0}, {"branch": 0}])
def test_settings_out_of_range_are_refused(change: dict[str, int]):
    with pytest.raises(ValueError, match="need width and branch >= 1"):
        beam_search(
            Speller(), by_likelihood, roots(1), until=".", **{"width": 1, "branch": 1} | change
        )
    with pytest.raises(ValueError, match="need rounds and branch >= 1"):
        tree_search(Speller(), by_likelihood, roots(1), rounds=0, branch=1, until=".")
    with pytest.raises(ValueError, match="need budget and waits >= 0"):
        budget_forcing(*thinker(), roots(1), how=Forcing(budget=-1))
