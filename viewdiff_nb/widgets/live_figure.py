"""A matplotlib figure that is redrawn within milliseconds, because only what moves is drawn anew."""

import io

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


class LiveFigure:
    """Keeps what does not move as pixels.

    Args:
        fig: the figure, complete; its layout stays as it is now.
        moving: artists whose data will change; the later ones lie on top.
    """

    def __init__(self, fig: Figure, moving: list[Artist]) -> None:
        self.fig, self.moving = fig, moving
        self.canvas = FigureCanvasAgg(fig)
        for _ in range(2):  # the layout leaves room for what moves; axes of equal aspect need a second look
            self.canvas.draw()
        fig.set_layout_engine("none")
        for artist in moving:
            artist.set_animated(True)
        self.canvas.draw()
        self.still = self.canvas.copy_from_bbox(fig.bbox)

    def png(self) -> bytes:
        """The figure as it is now."""
        self.canvas.restore_region(self.still)
        for artist in self.moving:
            self.fig.draw_artist(artist)
        return png_bytes(Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3]))

    def box(self, ax) -> list[float]:
        """Where axes lie in the picture: [left, top, right, bottom] in 0..1 from the top left corner."""
        place = ax.get_position()
        return [place.x0, 1 - place.y1, place.x1, 1 - place.y0]


def png_bytes(picture: Image.Image) -> bytes:
    """Encoded for the front end: quickly rather than tightly."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def figure_png(fig: Figure) -> bytes:
    """A whole figure as a PNG, at its own resolution."""
    buffer = io.BytesIO()
    FigureCanvasAgg(fig).print_png(buffer)
    return buffer.getvalue()
