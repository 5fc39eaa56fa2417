"""A slider that redraws a figure in a notebook; without a kernel the notebook shows the last picture."""

from collections.abc import Callable

import ipywidgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from vitbench.base.files import figure_bytes
from vitbench.figures.drawing import style


def figure_slider(draw: Callable[[int], Figure], name: str, low: int, high: int, start: int) -> ipywidgets.VBox:
    """A slider from `low` to `high`, and below it the figure `draw(value)` as a picture.

    The picture is an image widget and not an output widget: a notebook that is executed without a front end could wait
    forever for an output widget.
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
