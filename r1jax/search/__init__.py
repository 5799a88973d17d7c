"""Ways to spend more tokens on a problem: beams over steps, tree search, forced thinking.

A strategy is a function of `sample`, which continues answers, and of `value`, which scores them; it
knows no model. All problems advance together: one call of `sample` continues the paths of all.
"""
