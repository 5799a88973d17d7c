"""The pool of scoring workers: right values, and whole again after whatever an answer does."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1jax.rewards import worker
from r1jax.rewards.countdown import accuracy
from r1jax.rewards.format import think_answer
from r1jax.rewards.pool import Pool, open_pool
from r1jax.rewards.weighted import Batched, Weighted, score, score_many, weighted

ROW = {"numbers": [7, 5, 3], "target": 9}
RIGHT = "<think> try </think> <answer> 7 + 5 - 3 </answer>"

RULES = '''
import ctypes, os, signal, subprocess, sys, time

def rule(row, answer):
    """Does what the answer says."""
    if answer == "hang":
        time.sleep(1000)
    elif answer == "hang in C":
        return 10 ** (10 ** 9)
    elif answer == "hang without signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(1000)
    elif answer == "exit":
        os._exit(3)
    elif answer == "segfault":
        ctypes.string_at(0)
    elif answer == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif answer == "recurse":
        return rule(row, answer)
    elif answer == "memory":
        return len(bytes(2 ** 40))
    elif answer == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        open(row["file"], "w").write(str(child.pid))
        time.sleep(1000)
    elif answer == "print":
        print("printed", flush=True)
    elif answer == "malformed":
        raise ValueError("row has no field 'target'")
    elif answer == "bug":
        return {}["missing"]
    elif answer == "modules":
        return sorted(sys.modules)
    elif answer == "who":
        return os.getpid()
    elif answer == "spin":
        while True:
            pass
    elif answer == "wait":
        time.sleep(0.5)
    elif answer == "warm":
        return warmed
    return row.get("value")

def offset(row, answer, *, by):
    return len(answer) + by

warmed = 0

def warm():
    global warmed
    warmed += 1

def cold():
    raise ModuleNotFoundError("no such library")
'''

HOSTILE = ["hang", "hang in C", "hang without signals", "exit", "segfault", "kill", "recurse"]


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory):
    """A module that workers can import, as they can a user's own."""
    folder = tmp_path_factory.mktemp("rules")
    (folder / "scoring_rules.py").write_text(RULES)
    sys.path.insert(0, str(folder))
    yield __import__("scoring_rules")
    sys.path.remove(str(folder))


def test_values_are_those_of_the_function_in_order():
    answers = [RIGHT, "", "<answer>7+5+3</answer>", "<answer>7 + 5 - 3 \ud800</answer>"] * 60
    expected = [accuracy(ROW, answer) for answer in answers]
    with open_pool(workers=2) as pool:
        assert pool.map(accuracy, [ROW] * len(answers), answers) == expected
        assert pool.map(accuracy, [], []) == []
        assert (pool.timeouts, pool.crashes) == (0, 0)


def test_a_partial_and_then_another_function_run_on_the_same_workers(rules):
    with open_pool(workers=1) as pool:
        add = functools.partial(rules.offset, by=10)
        assert pool.map(add, [{}] * 2, ["", "abc"]) == [10, 13]
        first = pool.map(rules.rule, [{}], ["who"])
        assert pool.map(functools.partial(rules.offset, by=0), [{}], ["ab"]) == [2]
        assert pool.map(rules.rule, [{}], ["who"]) == first


def test_hostile_answers_are_none_and_counted_and_the_pool_is_whole_afterwards(rules):
    answers = [text for hostile in HOSTILE for text in (hostile, "ok", "ok", "ok")]
    rows = [{"value": i} for i in range(len(answers))]
    began = time.monotonic()
    with open_pool(workers=2, seconds=1) as pool:
        values = pool.map(rules.rule, rows, answers)
        assert values == [None if text in HOSTILE else i for i, text in enumerate(answers)]
        assert (pool.timeouts, pool.crashes) == (3, 4)
        again = pool.map(rules.rule, [{"value": i} for i in range(40)], ["ok"] * 40)
        assert again == list(range(40))
        assert (pool.timeouts, pool.crashes) == (3, 4)
    assert time.monotonic() - began < 30  # 3 * 1 s of waiting, 7 new workers


def test_a_memory_limit_makes_a_greedy_answer_none(rules):
    with open_pool(workers=1, seconds=5, memory=2**32) as pool:
        assert pool.map(rules.rule, [{"value": 1}] * 2, ["memory", "ok"]) == [None, 1]
        assert (pool.timeouts, pool.crashes) == (0, 1)


def test_who_has_no_memory_for_a_message_reads_no_more_of_the_pipe():
    class Full:
        def recv_bytes(self) -> bytes:
            raise MemoryError

    with pytest.raises(EOFError):  # on which a child ends, and its keeper with it
        worker._work(Full())


def test_processor_time_is_limited_apart_from_the_clock(rules):
    pool = Pool(workers=1, seconds=60)
    try:
        values = pool.map(rules.rule, [{"value": 1}] * 3, ["spin", "wait", ""], cpu_seconds=0.2)
        assert values == [None, 1, 1]
        assert (pool.done, pool.timeouts, pool.crashes) == (2, 1, 0)
        assert pool.map(rules.rule, [{"value": 1}] * 2, ["wait", ""], seconds=0.1) == [None, 1]
        assert (pool.done, pool.timeouts, pool.crashes) == (3, 2, 0)
    finally:
        pool.close()


def test_what_takes_long_is_done_once_however_often_a_worker_is_lost(rules):
    pool = Pool(workers=1, seconds=5, warm=rules.warm)
    try:
        assert pool.map(rules.rule, [{}] * 3, ["warm", "exit", "warm"]) == [1, None, 1]
        processes = pool.processes()
        assert pool.map(rules.rule, [{}] * 4, ["recurse", "warm", "segfault", "warm"])[3] == 1
        assert pool.processes() == processes
    finally:
        pool.close()


def test_a_worker_that_cannot_start_is_named_in_one_line(rules):
    pool = Pool(workers=1, seconds=5, warm=rules.cold)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^a worker cannot start: no such library$"):
            pool.map(rules.rule, [{}], ["ok"])
        assert pool.processes() == []


def test_no_more_workers_are_started_than_there_are_answers(rules):
    pool = Pool(workers=3, seconds=5)
    try:
        assert pool.map(rules.rule, [], []) == [] and pool.processes() == []
        for _ in range(3):
            pool.map(rules.rule, [{}], ["ok"])
            assert len(pool.processes()) == 1
    finally:
        pool.close()


def test_a_worker_that_died_between_two_calls_costs_no_answer(rules):
    with open_pool(workers=1, seconds=5) as pool:
        [process] = pool.map(rules.rule, [{}], ["who"])
        os.kill(process, 9)
        time.sleep(0.2)
        assert pool.map(rules.rule, [{"value": 1}], ["ok"]) == [1]
        assert (pool.timeouts, pool.crashes) == (0, 0)


def test_what_a_late_worker_started_is_killed_with_it(rules, tmp_path: Path):
    file = tmp_path / "pid"
    with open_pool(workers=1, seconds=3) as pool:
        assert pool.map(rules.rule, [{"file": str(file)}], ["child"]) == [None]
    gone(int(file.read_text()))


def test_workers_end_with_the_block_and_with_the_program(rules, tmp_path: Path):
    with open_pool(workers=1) as pool:
        [worker] = pool.map(rules.rule, [{}], ["who"])
    gone(worker)
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from r1jax.rewards.pool import open_pool; from scoring_rules import rule\n"
        "import os, signal\n"
        "with open_pool(workers=1) as pool:\n"
        "    print(*pool.map(rule, [{}], ['who']), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    gone(int(killed.stdout))


def gone(process: int) -> None:
    """Waits for the end of a process, of which a zombie may be left."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if ") Z " in Path(f"/proc/{process}/stat").read_text():
                return
        except FileNotFoundError:
            return
        time.sleep(0.02)
    pytest.fail(f"process {process} lives on")


def test_what_the_function_raises_is_raised_here(rules):
    with open_pool(workers=2) as pool:
        with pytest.raises(ValueError, match=r"^row has no field 'target'$"):
            pool.map(rules.rule, [{}] * 9, ["ok"] * 8 + ["malformed"])
        with pytest.raises(RuntimeError, match="KeyError: 'missing'"):
            pool.map(rules.rule, [{}] * 3, ["bug"] * 3)
        assert pool.map(rules.rule, [{"value": 1}], ["ok"]) == [1]


def test_a_function_that_no_worker_can_import_is_refused_in_one_line():
    with open_pool(workers=1) as pool:
        with pytest.raises(ValueError, match="cannot be sent to a scoring worker"):
            pool.map(lambda row, answer: 1.0, [ROW], [""])
        here = type(sys)("r1jax_config_file")
        exec("def reward(row, answer): return 1.0", vars(here))
        sys.modules["r1jax_config_file"] = here
        try:
            with pytest.raises(ValueError, match="cannot import the reward: No module named"):
                pool.map(vars(here)["reward"], [ROW], [""])
        finally:
            del sys.modules["r1jax_config_file"]
        assert pool.map(accuracy, [ROW], [RIGHT]) == [1.0]


def test_what_a_rule_prints_does_not_disturb_its_value(rules):
    with open_pool(workers=1) as pool:
        assert pool.map(rules.rule, [{"value": 2}], ["print"]) == [2]


def test_a_worker_imports_the_rewards_and_nothing_slow(rules):
    with open_pool(workers=1) as pool:
        [modules] = pool.map(rules.rule, [{}], ["modules"])
    assert "r1jax.rewards.worker" in modules
    assert {"jax", "numpy", "transformers", "pytest"} & set(modules) == set()


def test_without_workers_all_is_computed_here(rules):
    with open_pool(workers=0) as pool:
        assert pool.map(rules.rule, [{}], ["who"]) == [os.getpid()]
        assert pool.map(rules.rule, [{}], ["recurse"]) == [None]
        assert (pool.timeouts, pool.crashes) == (0, 1)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="workers must be >= 0"), open_pool(workers=-1):
        pass
    with pytest.raises(ValueError, match="seconds must be > 0"), open_pool(workers=1, seconds=0):
        pass


# --------------------------------------------------------------------------- whole rollouts


def lengths(rows, answers):
    return [None if not answer else float(len(answer)) for answer in answers]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "reward",
    [
        accuracy,
        weighted(accuracy=(1.0, accuracy), format=(0.5, think_answer)),
        Batched(lengths),
        weighted(accuracy=(1.0, accuracy), judge=(0.1, Batched(lengths))),
        weighted(judge=(0.1, Batched(lengths)), other=(0.2, Batched(lengths))),
    ],
)
def test_a_rollout_scores_as_its_answers_do_one_by_one(reward, workers: int):
    answers = [RIGHT, "", "<answer>7+5-3</answer>", "no"]
    rows = [ROW] * len(answers)
    expected = []
    for row, answer in zip(rows, answers, strict=True):
        parts = reward.parts(row, answer) if isinstance(reward, Weighted) else {}
        expected.append((reward(row, answer), parts))
    with open_pool(workers=workers) as pool:
        assert score_many(reward, rows, answers, each=pool.map) == expected
    assert score_many(reward, rows, answers) == expected


def test_a_judge_is_asked_once_for_a_rollout():
    calls = []

    def many(rows, answers):
        calls.append(list(answers))
        return [0.5] * len(answers)

    score_many(weighted(judge=(1.0, Batched(many))), [ROW] * 3, ["a", "b", "c"])
    assert calls == [["a", "b", "c"]]


def test_what_the_pool_gave_up_is_not_judged(rules):
    reward = weighted(rule=(1.0, rules.rule), judge=(1.0, Batched(lengths)))
    with open_pool(workers=1, seconds=5) as pool:
        got = score_many(reward, [{"value": 2.0}] * 2, ["exit", "ok"], each=pool.map)
    assert got == [(None, {}), (4.0, {"rule": 2.0, "judge": 2.0})]


@pytest.mark.parametrize("answer", [b"<answer> 7 + 5 - 3 </answer>", None, 9])
def test_an_answer_that_is_no_text_is_named_whatever_the_rule(answer):
    with pytest.raises(ValueError, match=r"answer 1 must be text \(str\), got"):
        score_many(accuracy, [ROW] * 2, [RIGHT, answer])
    with pytest.raises(ValueError, match=r"answer 0 must be text \(str\), got"):
        score(weighted(accuracy=(1.0, accuracy)), ROW, answer)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_that_is_not_finite_is_refused_in_a_rollout_too(rules, workers: int):
    with open_pool(workers=workers) as pool:
        with pytest.raises(ValueError, match="reward must give a finite number or None, got nan"):
            score_many(rules.rule, [{"value": float("nan")}], ["ok"], each=pool.map)
        with pytest.raises(ValueError, match="judge must give a finite number"):
            judge = Batched(lambda rows, answers: [float("inf")])
            score_many(weighted(judge=(1.0, judge)), [{}], ["ok"], each=pool.map)
    with pytest.raises(ValueError, match="judge must give 2 values, got 1"):
        score_many(weighted(judge=(1.0, Batched(lambda rows, answers: [1.0]))), [{}] * 2, ["", ""])
