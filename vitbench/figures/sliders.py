"""A slider under a notebook's cell that draws a figure anew; the figure is there without a kernel too, as it was last."""

from collections.abc import Callable

import ipywidgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from vitbench.base.files import figure_bytes
from vitbench.figures.drawing import style


def figure_slider(draw: Callable[[int], Figure], name: str, low: int, high: int, start: int) -> ipywidgets.VBox:
    """A slider from `low` to `high`, and below it `draw(value)` as a picture.

    The picture is a value of its own and not the output of a cell, which a notebook that is run by a program, and so has no
    front end, could wait for without end.
    """

    def picture(value: int) -> bytes:
        with style():
            figure = draw(value)
            png = figure_bytes(figure, "png")
            plt.close(figure)
        return png

    slider = ipywidgets.IntSlider(value=start, min=low, max=high, description=name, continuous_update=False)
    image = ipywidgets.Image(value=picture(start), format="png")
    slider.observe(lambda change: setattr(image, "value", picture(change["new"])), names="value")
    return ipywidgets.VBox([slider, image])
