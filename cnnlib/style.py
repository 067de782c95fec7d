"""How figures look: one colour and marker for each connectivity, everywhere."""

from __future__ import annotations

import sys
from typing import Any

# Okabe and Ito's colours (2008), told apart by colour-blind readers; the marker tells as well.
STYLE = {"full": ("#0072B2", "o"), "local": ("#009E73", "s"), "conv": ("#D55E00", "^")}


def pyplot_for_files() -> tuple[Any, Any]:
    """matplotlib's `pyplot` and `ticker` for drawing into files, where no screen is needed; imported when used.

    In a notebook its own way to show figures stays.
    """
    import matplotlib

    if "ipykernel" not in sys.modules:
        matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    return pyplot, ticker
