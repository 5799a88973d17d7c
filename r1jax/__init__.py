"""DeepSeek-R1 and its open reproductions in JAX."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 an older Python reads this without make
    sys.exit("r1jax needs Python 3.11 or later, this is %d.%d" % sys.version_info[:2])  # noqa: UP031
