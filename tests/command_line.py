"""The ``uplift`` command within the tests' own process: a second instead of the five that a new one takes to begin."""

from __future__ import annotations

import sys
from typing import Any

from uplift_core.cli import main

COLUMNS = "300"


def here(monkeypatch: Any, capfd: Any, *words: object) -> tuple[int, str, str]:
    """Exit code, what it wrote, and what it said on stderr."""
    monkeypatch.setattr(sys, "argv", ["uplift", *map(str, words)])
    monkeypatch.setenv("COLUMNS", COLUMNS)
    monkeypatch.setenv("HF_HUB_VERBOSITY", "error")  # as the command sets it; here it shall not last
    capfd.readouterr()
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    else:
        code = 0
    return (code if isinstance(code, int) else int(code is not None), *capfd.readouterr())
