"""r1jax.evaluate: the estimators against their definitions, the command against the run itself."""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from math import comb
from pathlib import Path

import jax
import pytest

from r1jax import config, metrics, restore, sharding
from r1jax.evaluate import __main__ as evaluate
from r1jax.evaluate.estimators import best_at_k, majority_at_k, pass_at_k, weighted_at_k
from r1jax.evaluate.judging import Judged, math_votes, measure, verdicts
from r1jax.evaluate.problems import find_problems
from r1jax.loops.evaluation import make_evaluation
from r1jax.loops.run import Context, Scorer
from r1jax.metrics import Estimate
from r1jax.models import decoder
from r1jax.settings import Reinforce, evaluation_of

ROOT = Path(__file__).parents[1]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --------------------------------------------------------------------------- estimators


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_sets_of_k_answers_that_hold_a_right_one(n: int):
    for c in range(n + 1):
        for k in range(1, n + 1):
            sets = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, sets)) / len(sets), abs=1e-15)


def test_pass_at_k_takes_counts_whose_binomials_no_float_can_hold():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(100 / 10_000)  # the one is among the k
    assert pass_at_k(10_000, 0, 100) == 0 and pass_at_k(10_000, 9_950, 100) == 1


def elected(votes: list[str | None], right: list[float], k: int) -> Fraction:
    """maj@k by its definition: every set of k, every winner, every one of its voters."""
    total = Fraction(0)
    for chosen in combinations(range(len(votes)), k):
        counts = Counter(votes[i] for i in chosen if votes[i] is not None)
        winners = [vote for vote, count in counts.items() if count == max(counts.values())]
        for winner in winners:
            voters = [i for i in chosen if votes[i] == winner]
            total += Fraction(int(sum(right[i] for i in voters)), len(voters) * len(winners))
    return total / comb(len(votes), k)


@pytest.mark.parametrize("seed", range(12))
def test_majority_at_k_is_the_mean_over_all_sets_winners_and_voters(seed: int):
    rng = random.Random(seed)
    n = rng.randint(1, 8)
    votes = [rng.choice(["a", "a", "b", "b", "c", "d", None]) for _ in range(n)]
    right = [float(vote == "a" or rng.random() < 0.2) for vote in votes]
    for k in range(1, n + 1):
        assert majority_at_k(votes, right, k) == pytest.approx(elected(votes, right, k), abs=1e-15)


def test_majority_at_k_in_a_case_worked_by_hand():
    # Of the three pairs one holds the right vote twice and two are ties, half of which it wins.
    assert majority_at_k(["a", "a", "b"], [1, 1, 0], 2) == pytest.approx(1 / 3 + 2 / 3 / 2)
    assert majority_at_k(["a", "b", "b"], [1, 0, 0], 3) == 0
    assert majority_at_k([None, None, "a"], [0, 0, 1], 3) == 1  # who abstains does not count
    assert majority_at_k([None, None], [0, 0], 2) == 0


def test_majority_at_k_of_many_different_votes_takes_no_time():
    votes = [str(i % 60) for i in range(128)]
    right = [float(vote == "0") for vote in votes]
    # Eight votes were given three times, "0" among them, the others twice.
    assert 1 / 60 < majority_at_k(votes, right, 64) < 1 / 8


@pytest.mark.parametrize("k", [0, 4])
def test_estimates_for_more_answers_than_there_are_are_refused(k: int):
    with pytest.raises(ValueError, match=f"n=3, c=1, k={k}"):
        pass_at_k(3, 1, k)
    with pytest.raises(ValueError, match=f"3 votes, 3 verdicts, k={k}"):
        majority_at_k(["a", "b", "c"], [1, 0, 0], k)


@pytest.mark.parametrize("seed", range(8))
def test_best_at_k_is_the_mean_over_all_sets_of_k_and_over_ties_at_their_top(seed: int):
    rng = random.Random(seed)
    n = rng.randint(1, 7)
    scores = [rng.choice([-1.5, 0.0, 0.25, 2.0]) for _ in range(n)]
    right = [rng.choice([0.0, 1.0]) for _ in range(n)]
    for k in range(1, n + 1):
        total = Fraction(0)
        for chosen in combinations(range(n), k):
            top = max(scores[i] for i in chosen)
            tied = [int(right[i]) for i in chosen if scores[i] == top]
            total += Fraction(sum(tied), len(tied))
        assert best_at_k(scores, right, k) == pytest.approx(float(total / comb(n, k)), abs=1e-15)


def test_weighted_at_k_elects_the_heaviest_vote_of_each_block_of_k_answers():
    votes, right = ["a", "b", "b", "a", "a", None, "c"], [1, 0, 0, 1, 1, 0, 0]
    weights = [0.5, 0.2, 0.2, 0.1, 0.1, 9.0, 9.0]
    # a: 0.5 against b: 0.4; then a: 0.2 against an abstention; the seventh answer is left over.
    assert weighted_at_k(votes, weights, right, 3) == 1.0
    assert weighted_at_k(votes, [0.3, *weights[1:]], right, 3) == 0.5
    # With equal weights it is the majority, and a tie is shared, however the sums are rounded.
    assert weighted_at_k(["a", "b"] * 3, [0.1, 0.3, 0.2, 0.2, 0.3, 0.1], [1, 0] * 3, 6) == 0.5
    assert weighted_at_k([None, None], [1, 1], [0, 0], 2) == 0
    assert weighted_at_k(["a", "a"], [0, 0], [1, 1], 2) == 0


def test_scores_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="2 scores, 1 verdicts, k=1"):
        best_at_k([1.0, 2.0], [1.0], 1)
    with pytest.raises(ValueError, match="a score must be a number"):
        best_at_k([float("nan")], [1.0], 1)
    with pytest.raises(ValueError, match=r"weight must be finite and >= 0, got -0\.5"):
        weighted_at_k(["a"], [-0.5], [1.0], 1)
    with pytest.raises(ValueError, match="1 votes, 1 weights, 1 verdicts, k=2"):
        weighted_at_k(["a"], [0.5], [1.0], 2)


# --------------------------------------------------------------------------- votes and verdicts


def grouped(*finals: str) -> list[set[str]]:
    """Which final answers vote together."""
    groups: dict = {}
    votes = math_votes([f"So \\boxed{{{text}}}." for text in finals])
    for text, vote in zip(finals, votes, strict=True):
        groups.setdefault(vote, set()).add(text)
    return sorted(groups.values(), key=sorted)


def test_answers_that_the_verifier_takes_for_the_same_are_one_vote():
    assert grouped("0.5", "1/2", "\\frac{1}{2}", "\\frac12", "5") == [
        {"0.5", "1/2", "\\frac{1}{2}", "\\frac12"},
        {"5"},
    ]
    assert grouped("18", "\\$18", "18 dollars", "18.00") == [{"18", "\\$18", "18 dollars", "18.00"}]
    assert grouped("(a+b)^2", "a^2+2ab+b^2", "a^2+b^2") == [
        {"(a+b)^2", "a^2+2ab+b^2"},
        {"a^2+b^2"},
    ]
    assert grouped("B", "\\text{(B)}", "C") == [{"B", "\\text{(B)}"}, {"C"}]


def test_groups_do_not_depend_on_the_order_of_the_answers_and_silence_abstains():
    answers = ["\\boxed{12\\%}", "\\boxed{12}", "\\boxed{0.12}", "\\boxed{12}", "no\nanswer"]
    votes = dict(zip(answers, math_votes(answers), strict=True))
    # 12% is the same as 12 and as 0.12, which differ: it goes with the one that is more frequent.
    assert votes["\\boxed{12\\%}"] == votes["\\boxed{12}"] == "12"
    assert votes["\\boxed{0.12}"] == "0.12" and votes["no\nanswer"] is None
    for seed in range(5):
        shuffled = random.Random(seed).sample(answers, len(answers))
        assert dict(zip(shuffled, math_votes(shuffled), strict=True)) == votes


def test_each_answer_is_judged_by_the_verifier_of_its_own_row():
    words = {"verifier": "math", "answer": "18"}
    other = {"verifier": "math", "answer": "\\frac12"}
    made = {"verifier": "countdown", "numbers": [7, 5, 3], "target": 9}
    rows = [words, made, other, words, words, made]
    answers = ["#### 18", "<answer> 7 + 5 - 3 </answer>", "0.5", "0.5", "#### 18", "18"]
    assert verdicts(rows, answers) == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="verifier"):
        verdicts([{"answer": "1"}], ["1"])


# --------------------------------------------------------------------------- over many problems


def judged(accuracy: float | None, vote: str | None = None, score: float | None = None) -> Judged:
    return Judged(answer="", length=1, finished=True, accuracy=accuracy, vote=vote, score=score)


def test_measures_are_means_over_problems_with_an_interval_over_problems():
    problems = [[judged(1.0, "a"), judged(0.0, "b")], [judged(0.0, "c"), judged(0.0, "c")]]
    found = measure(problems, [1, 2])
    low, high = metrics.bootstrap_interval([0.5, 0.0])
    assert found == {
        "pass@1": Estimate(0.25, low, high, 2),
        "pass@2": Estimate(0.5, 0.0, 1.0, 2),
        "maj@2": Estimate(0.25, low, high, 2),
    }


def test_scores_add_the_best_and_the_weighted_vote():
    problems = [[judged(1.0, "a", 0.6), judged(0.0, "b", 0.2), judged(0.0, "b", 0.3)]]
    found = {name: estimate.mean for name, estimate in measure(problems, [1, 3]).items()}
    assert found == pytest.approx(
        {"pass@1": 1 / 3, "pass@3": 1, "maj@3": 0, "best@3": 1, "weighted@3": 1}
    )
    negative = [[judged(1.0, "a", -0.6), judged(0.0, "b", -2.0)]]
    assert list(measure(negative, [2])) == ["pass@2", "maj@2", "best@2"]
    some = [[judged(1.0, "a", 0.6), judged(0.0, "b")]]
    assert list(measure(some, [2])) == ["pass@2", "maj@2"]


def test_without_votes_there_is_no_majority_to_measure():
    assert list(measure([[judged(1.0), judged(0.0)]], [1, 2])) == ["pass@1", "pass@2"]


def test_answers_that_could_not_be_judged_are_left_out():
    found = measure([[judged(None), judged(1.0)], [judged(0.0), judged(0.0)]], [1, 2])
    assert found["pass@1"][0] == 0.5
    assert found["pass@2"] == Estimate(0.0, 0.0, 0.0, 1)
    assert measure([[judged(None)]], [1]) == {}


# --------------------------------------------------------------------------- the command


def test_the_table_and_the_summary_say_what_the_kept_answers_show(small_run, tmp_path, capsys):
    out = tmp_path / "new" / "all.jsonl"
    evaluate.main(
        [str(small_run), "--samples", "4", "--k", "1,2,4", "--rows", "9", "--out", str(out)]
    )
    kept, summary = lines(out), json.loads(out.with_suffix(".json").read_text())
    assert [(each["problem"], each["sample"]) for each in kept] == [
        (i, j) for i in range(9) for j in range(4)
    ]
    for each in kept:
        words = each["answer"].split()
        assert each["accuracy"] == float(len(words) % 2 == 0)
        assert each["vote"] == (words[-1] if words else None)
        assert each["finished"] or each["length"] == 12
        numbers = " ".join(map(str, each["row"]["numbers"]))
        assert each["prompt"] == f"make {each['row']['target']} from {numbers}"
    right = [sum(each["accuracy"] for each in kept[i : i + 4]) for i in range(0, 36, 4)]
    assert 0 < sum(right) < 36  # or the test could not fail
    printed = capsys.readouterr()
    for name, values in {
        "pass@1": [c / 4 for c in right],
        "pass@4": [float(c > 0) for c in right],
    }.items():
        low, high = metrics.bootstrap_interval(values)
        mean = sum(values) / 9
        expected = {"mean": mean, "low": low, "high": high, "problems": 9}
        assert summary[name] == pytest.approx(expected)
        assert f"{name}      {mean:8.1%}   {low:.1%} to {high:.1%}\n" in printed.out
    assert summary["tokens"] == sum(each["length"] for each in kept)
    assert summary["cut"] == pytest.approx(sum(not each["finished"] for each in kept) / 36)
    assert "maj@4" in printed.out and "9 held-out problems, 4 answers each" in printed.out
    assert "of 9 problems" in printed.err  # in two calls of the engine

    # An answer does not depend on how many are asked for.
    evaluate.main([str(small_run), "--samples", "1", "--out", str(out)])
    first = [each["answer"] for each in kept if each["sample"] == 0]
    assert [each["answer"] for each in lines(out)] == first[:8]


def test_one_answer_a_problem_is_the_evaluation_that_the_run_itself_makes(small_run, tmp_path):
    evaluate.main([str(small_run), "--samples", "1"])
    name = "rl-3-test-8x1-t1"
    kept = lines(small_run / "evaluations" / f"{name}.jsonl")
    summary = json.loads((small_run / "evaluations" / f"{name}.json").read_text())

    run = config.load(*config.saved(small_run))
    stage, mesh = run.stages[1], sharding.make_mesh(run.mesh)
    assert isinstance(stage, Reinforce)
    context = Context(
        run=run,
        folder=tmp_path,
        text=[],
        tokenizer=run.tokenizer(),
        mesh=mesh,
        writer=metrics.open_writer(tmp_path),
        stopping=lambda: False,
    )
    params = sharding.init(decoder.leaves(run.model), jax.random.key(3), mesh)

    scorer = Scorer(
        reward=lambda rows, answers: [(0.0, {})] * len(answers),
        each=lambda function, rows, answers: list(map(function, rows, answers)),
    )
    with jax.set_mesh(mesh):
        asked = evaluation_of(replace(stage, evaluate_rows=8))
        assert asked is not None
        own = make_evaluation(asked, stage.name, context, scorer)(params, 3)
    answers = [each["answer"] for each in metrics.read_samples(tmp_path)]
    assert len(set(answers)) > 1 and [each["answer"] for each in kept] == answers
    for ours, theirs in (("length", "test/length"), ("cut", "test/cut"), ("words", "test/words")):
        assert summary[ours] == pytest.approx(own[theirs])
    assert summary["pass@1"]["mean"] == pytest.approx(own["test/accuracy"])
    assert summary["pass@1"]["low"] == own["test/accuracy_low"]


def test_a_run_without_rewards_is_asked_what_its_evaluation_asks(small_run, tmp_path):
    folder = tmp_path / "texts"
    shutil.copytree(small_run / "checkpoints" / "base", folder / "checkpoints" / "base")
    spec = f"{ROOT / 'tests' / 'small_config.py'}:texts"
    config.save(folder, config.describe(config.check(spec)), spec)
    model = restore.open_run(folder)
    found = find_problems(evaluate.parser().parse_args([str(folder)]), model)
    assert (found.stage, found.data, found.engine.max_new) == ("base", "test", 9)
    asked = evaluation_of(model.run.stages[0])
    assert asked is not None and found.task is asked.task
    assert found.rows == asked.task.test()[:5]


def test_another_stage_has_other_weights_and_another_seed_draws_other_answers(small_run, tmp_path):
    out, texts = tmp_path / "some.jsonl", set()
    for flags in ([], ["--stage", "base", "--checkpoint", "1"], ["--seed", "1"], ["--seed", "0"]):
        evaluate.main([str(small_run), "--samples", "1", "--out", str(out), *flags])
        texts.add(out.read_text())
    assert len(texts) == 3  # seed 0 is the run's


def test_problems_may_come_from_a_file(small_run, tmp_path, capsys):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"numbers": [7, 5, 3], "target": 9}\n{"numbers": [1, 2], "target": 3}\n' * 3)
    evaluate.main([str(small_run), "--data", str(data), "--samples", "1"])
    assert f"6 problems of {data}, 1 answer each" in capsys.readouterr().out
    kept = lines(small_run / "evaluations" / "rl-3-mine-6x1-t1.jsonl")
    assert [each["prompt"] for each in kept] == ["make 9 from 7 5 3", "make 3 from 1 2"] * 3


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    with pytest.raises(SystemExit) as left:
        evaluate.main([str(each) for each in arguments])
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_a_user_gets_wrong_is_one_line(small_run: Path, tmp_path, capsys):
    assert "no such folder" in refused(capsys, tmp_path / "none")
    assert "is no run folder: it has no config.json" in refused(capsys, tmp_path)
    err = refused(capsys, small_run, "--samples", 4, "--k", "1,8")
    assert err == "error: --k 8 needs as many answers, got --samples 4\n"
    assert "--k 9 needs as many" in refused(capsys, small_run, "--k", 9)
    assert "has no stage 'r'; there are: base, rl" in refused(capsys, small_run, "--stage", "r")
    assert "no checkpoint 7 in" in refused(capsys, small_run, "--checkpoint", 7)
    assert "no checkpoint 'best' in" in refused(capsys, small_run, "--checkpoint", "best")
    err = refused(capsys, small_run, "--rows", 10)
    assert err == "error: --rows 10 is more than the 9 that there are\n"
    assert "temperature must be >= 0" in refused(capsys, small_run, "--temperature", -1)
    greedy = refused(capsys, small_run, "--temperature", 0, "--samples", 2)
    assert "need --samples 1 at temperature 0, got 2" in greedy
    assert "model.dim" in refused(capsys, small_run, "--set", "model.dim=x")
    assert "embed is float32" in refused(capsys, small_run, "--set", "model.dim=32")
    assert "--out must be a file" in refused(capsys, small_run, "--out", tmp_path)
    assert "no such file" in refused(capsys, small_run, "--data", tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"numbers": [1, 2]}', "row 2: row has no field 'target'; it has numbers"),
        ('{"numbers": [1, 2, 3, 4, 5, 6], "target": 3}', "has 9 tokens, engine.max_prompt allows"),
        ('{"numbers": [1, 200], "target": 3}', "the tokenizer has no token for ' 200'"),
    ],
)
def test_a_row_that_no_prompt_can_be_made_of_is_one_line(small_run, tmp_path, capsys, row, said):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"numbers": [1, 2], "target": 3}\n' + row)
    assert said in refused(capsys, small_run, "--data", data, "--out", tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [data]


def test_a_damaged_checkpoint_and_a_run_without_one_are_one_line(small_run: Path, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(small_run, copy)
    sums = copy / "checkpoints" / "rl" / "3" / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("meta.json", "mate.json"))
    assert "checkpoint 3 in" in (err := refused(capsys, copy)) and "is damaged" in err
    shutil.rmtree(copy / "checkpoints")
    assert "has no checkpoint yet" in refused(capsys, copy)


# --------------------------------------------------------------------------- published sets


def test_a_published_set_is_asked_in_its_own_words(small_run: Path, tmp_path, capsys):
    run = tmp_path / "english"
    shutil.copytree(small_run, run)
    origin = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(origin | {"variant": "ascii"}))
    data = tmp_path / "mine.test.jsonl"
    rows = [{"question": f"{i} + {i}?", "answer": f"add\n#### {2 * i}"} for i in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [run, "--dataset", "gsm8k", "--data", data, "--samples", 2, "--prefill", "So "]
    evaluate.main([str(each) for each in asked])
    assert f"3 problems of {data}, 2 answers each" in capsys.readouterr().out
    kept = lines(run / "evaluations" / "rl-3-mine-3x2-t1.jsonl")
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    assert (
        kept[2]["prompt"] == f"1 + 1?\n\n{boxed}\nSo "
        and kept[2]["row"]["answer"] == rows[1]["answer"]
    )
    assert all(each["answer"].startswith("So ") and each["accuracy"] == 0.0 for each in kept)
    summary = json.loads((run / "evaluations" / "rl-3-mine-3x2-t1.json").read_text())
    assert summary["task"] == "gsm8k" and summary["pass@1"]["problems"] == 3

    assert "--dataset gsm8k needs its file" in refused(capsys, run, "--dataset", "gsm8k")
    data.write_text('{"q": "1 + 1?", "a": "2"}\n')
    err = refused(capsys, *asked)
    assert (
        f"{data} is no file of gsm8k: record 1 needs columns question, answer; it has q, a" in err
    )
    assert "needs a tokenizer with a chat template" in refused(
        capsys, run, "--dataset", "svamp", "--data", svamp(tmp_path), "--template", "chat"
    )
    assert "are for a --dataset" in refused(capsys, run, "--direct")


def svamp(folder: Path) -> Path:
    path = folder / "svamp.jsonl"
    path.write_text('{"Body": "I have 2.", "Question": "How many?", "Answer": 2.0}\n')
    return path


# --------------------------------------------------------------------------- answers of a file


def answers_file(folder: Path, *records: dict) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_answers_of_a_file_are_scored_without_jax(tmp_path: Path):
    file = answers_file(
        tmp_path,
        # Two ways to write the right answer outvote the wrong one; the wrong one scores best.
        {"question": "?", "gold": "#### 1/2", "responses": ["0.5", "3", "\\boxed{\\frac12}", "7"],
         "scores": [0.2, 0.9, 0.4, 0.1]},
        {"question": "?", "answer": 18, "responses": ["\\$18", "17", "17", ""],
         "scores": [0.8, 0.3, 0.1, 0.0]},
    )  # fmt: skip
    out = tmp_path / "kept.jsonl"
    program = (
        "import sys, runpy\n"
        "for name in ('jax', 'transformers', 'flax'): sys.modules[name] = None\n"
        f"sys.argv = ['', '--answers', {str(file)!r}, '--out', {str(out)!r}]\n"
        "runpy.run_module('r1jax.evaluate', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    table = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[2:]}
    # Of the first question's pairs, 5 of 6 hold a right answer; of the second's, 3 of 6.
    assert table["pass@1"] == f"{(1 / 2 + 1 / 4) / 2:.1%}"
    assert table["pass@2"] == f"{(5 / 6 + 3 / 6) / 2:.1%}"
    assert table["maj@4"] == "50.0%"  # an empty answer abstains: 17 has two of three votes
    assert table["best@4"] == "50.0%" and table["weighted@4"] == "50.0%"
    assert f"{file}: 2 questions, 8 responses" in done.stdout
    assert [(each["answer"], each["accuracy"]) for each in lines(out)][:4] == [
        ("0.5", 1.0), ("3", 0.0), ("\\boxed{\\frac12}", 1.0), ("7", 0.0)
    ]  # fmt: skip
    assert json.loads((tmp_path / "kept.json").read_text())["maj@4"]["mean"] == 0.5


def test_responses_that_do_not_say_where_their_answer_is_are_counted(tmp_path: Path, capsys):
    given = [
        ("#### 4", "It is 4"),
        ("\\boxed{4}", "4"),
        ("<think>\\boxed{4}</think> Done.", "<answer>4</answer>"),
        ("The answer is 4.", "no\nanswer"),
    ]
    records = [{"question": "2 + 2?", "gold": 4, "responses": responses} for responses in given]
    evaluate.main(["--answers", str(answers_file(tmp_path, *records))])
    said = capsys.readouterr().out
    assert f"unmarked       {4 / 8:.1%}   no box, tag nor 'the answer is'" in said
    assert f"pass@1         {5 / 8:.1%}" in said  # "4" is right as it stands, a sentence is not


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "?", "gold": 1}, "record 2 needs columns question, gold or answer, responses, "
         "and may have scores; it has prompt, gold"),
        ({"question": "?", "responses": ["1"]}, "record 2 needs columns question, gold or answer"),
        ({"question": "?", "gold": 1, "responses": "1"}, "must be a list of at least one text"),
        ({"question": "?", "gold": 1, "responses": []}, "must be a list of at least one text"),
        ({"question": "?", "gold": 1, "responses": ["1", None]}, "every response must be a text"),
        ({"question": "?", "gold": 1, "responses": ["1"], "scores": [1, 2]}, "a list of 1 numbers"),
        ({"question": "?", "gold": 1, "responses": ["1"], "scores": ["1"]}, "a finite number"),
        ({"question": "?", "gold": 1, "responses": ["1"], "scores": [1]}, "1 of 2 records have"),
        ({"question": "?", "gold": 1, "responses": ["1"], "score": [1]},
         "record 2: unknown column 'score': should it be 'scores'?"),
        ({"question": "?", "gold": 1, "answer": "2", "responses": ["1"]},
         "record 2: gold is 1 and answer '2': need one"),
        ({"question": "?", "gold": None, "responses": ["1"]}, "record 2: a row's answer must be"),
        ({"question": "?", "gold": 1, "responses": ["1"], "verifier": "x"}, "record 2: row['veri"),
    ],
)  # fmt: skip
def test_a_record_of_answers_that_cannot_be_used_is_one_line(tmp_path, capsys, record, said):
    good = {"question": "?", "gold": "1", "responses": ["1"]}
    err = refused(capsys, "--answers", answers_file(tmp_path, good, record))
    assert str(tmp_path) in err and said in err


def test_a_run_and_answers_are_not_taken_together_nor_neither(small_run, tmp_path, capsys):
    assert "need either a run's folder or --answers FILE" in refused(capsys)
    assert "need either" in refused(capsys, small_run, "--answers", tmp_path / "none.jsonl")
    for option in (("--samples", 4), ("--strategy", "direct"), ("--max-new", 9), ("--direct",)):
        said = refused(capsys, "--answers", tmp_path / "none.jsonl", *option)
        assert said == f"error: --answers asks no model: leave out {option[0]}\n"
    assert "no such file" in refused(capsys, "--answers", tmp_path / "none.jsonl")
    file = answers_file(tmp_path, {"question": "?", "gold": "1", "responses": ["1"]})
    assert "--k 4 needs as many responses" in refused(capsys, "--answers", file, "--k", 4)


def test_help_of_both_commands_needs_no_jax():
    program = (
        "import sys, runpy\n"
        "for name in ('jax', 'numpy', 'transformers'): sys.modules[name] = None\n"
        "sys.argv = ['', '--help']\n"
        "for name in ('evaluate', 'generate'):\n"
        "    try: runpy.run_module(f'r1jax.{name}', run_name='__main__')\n"
        "    except SystemExit as left: assert not left.code\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("usage: python -m r1jax.") == 2 and "--checkpoint" in done.stdout
