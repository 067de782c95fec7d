"""The style of all figures. Each connectivity has one colour and one marker."""

from __future__ import annotations

import sys
from typing import Any

# Okabe and Ito's colours (2008): colour-blind readers can distinguish them. Markers differ as well.
STYLE = {"full": ("#0072B2", "o"), "local": ("#009E73", "s"), "conv": ("#D55E00", "^")}


def pyplot_for_files() -> tuple[Any, Any]:
    """Import matplotlib's `pyplot` and `ticker`, set to draw into files without a screen, and return both.

    In a notebook, matplotlib keeps the notebook's backend.
    """
    import matplotlib

    if "ipykernel" not in sys.modules:
        matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    return pyplot, ticker
