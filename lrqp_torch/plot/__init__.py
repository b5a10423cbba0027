"""Charts: described once, then drawn with plotly or matplotlib, or written as a table.

    from lrqp_torch import plot
    plot.sweep("runs/gpt2").save("sweep.png")

See :mod:`lrqp_torch.plot.figures` for what can be drawn in one line, and
:mod:`lrqp_torch.plot.chart` for how any chart is described.
"""

from lrqp_torch.plot.figures import Figure, attention, dose, histogram, scatter, sweep

__all__ = ["Figure", "attention", "dose", "histogram", "scatter", "sweep"]
