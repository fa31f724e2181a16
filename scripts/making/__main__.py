"""The Makefile asks this once: what was typed -> the variables that follow from it, as text for make; or a report.

python3 -m scripts.making [--asked] [--below] WORDS GOALS [NAME=VALUE...]

WORDS: the words of the Makefile; GOALS: those that were typed; --asked: make -n or -q, so nothing is written; --below:
a make above this one may have its own settings. The answer is one line, because make's $(shell) takes no line breaks:
`{newline}` stands for them.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 8):  # noqa: UP036  make's host may have any; nothing newer than 3.0 above this line
    sys.stderr.write(
        "\n-- PYTHON IS TOO OLD ---------------------------------------------------------------- python3\n\n"
        "make decides with the first python3 on PATH. It is {}.{}; it must be 3.8 or later.\n\n"
        "Install a newer one, for instance:\n\n    sudo apt-get install python3\n\n".format(*sys.version_info[:2])
    )
    sys.exit(1)

from scripts.making import journey  # noqa: E402

if __name__ == "__main__":
    journey.main(sys.argv[1:])
