"""The parts of matplotlib that draw into files. Its import fails if the environment names a backend that does not exist."""

from __future__ import annotations

import os

__all__ = ["Axes", "Figure", "FigureCanvasAgg", "FuncFormatter", "MaxNLocator", "mpl"]

_named = os.environ.pop("MPLBACKEND", None)  # a notebook's, for example; files are drawn without one
try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator
finally:
    if _named is not None:
        os.environ["MPLBACKEND"] = _named
