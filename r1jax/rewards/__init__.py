"""Rules that score an answer's text: functions (row, answer) -> float or None. No JAX.

None means that the answer cannot be judged: it is left out and counted. A row holds the fields of
the problem and, where a rule needs them, `num_tokens` and `group_num_tokens` (see `length`).
`weighted` adds rules up, `dispatch` chooses one by the row, `pool` runs them in other processes.
"""
