"""Rules that score an answer's text: functions (row, answer) -> float or None. No JAX.

None means that the answer cannot be judged: it is left out and counted. A row holds the fields of
the problem and, where a rule needs them, `num_tokens` and `group_num_tokens` (see `length`).

  math/, code.py, countdown.py    whether the answer is right; programs run in sandbox/
  format.py, language.py, length.py, prose.py, simple_rl.py    how it is written
  judge.py, endpoint.py    what another model thinks of it
  weighted.py, dispatch.py    rules added up; a rule chosen by the row
  pool.py, worker.py    rules in other processes, which no answer can stop
"""
