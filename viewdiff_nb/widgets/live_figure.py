"""A matplotlib figure that is redrawn within milliseconds, because only what moves is drawn anew."""

import io

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image


class LiveFigure:
    """Keeps what does not move as pixels.

    Args:
        fig: the figure, complete; its layout stays as it is now.
        moving: artists whose data will change; the later ones lie on top. Images must fill their axes; they are copied
            cell by cell, which is ten times faster than drawing them.
    """

    def __init__(self, fig: Figure, moving: list[Artist]) -> None:
        self.fig = fig
        self.images = [artist for artist in moving if isinstance(artist, AxesImage)]
        self.others = [artist for artist in moving if not isinstance(artist, AxesImage)]
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
        for artist in self.others:
            self.fig.draw_artist(artist)
        pixels = np.array(np.asarray(self.canvas.buffer_rgba())[..., :3])
        for image in self.images:
            self._copy(image, pixels)
        return png_bytes(Image.fromarray(pixels))

    def box(self, ax: Axes) -> list[float]:
        """Where axes lie in the picture: [left, top, right, bottom] in 0..1 from the top left corner."""
        place = ax.get_position()
        return [place.x0, 1 - place.y1, place.x1, 1 - place.y0]

    def _copy(self, image: AxesImage, pixels: np.ndarray) -> None:
        """Draw the cells of an image, the first row on top, into its axes' part of the picture."""
        height, width = pixels.shape[:2]
        left, top, right, bottom = self.box(image.axes)
        x0, x1, y0, y1 = round(left * width), round(right * width), round(top * height), round(bottom * height)
        values = image.get_array()
        rgb = image.to_rgba(values, bytes=True)[..., :3] if values.ndim == 2 else (values * 255).astype(np.uint8)
        rows, columns = ((2 * np.arange(n) + 1) * cells // (2 * n) for n, cells in zip((y1 - y0, x1 - x0), rgb.shape,
                                                                                     strict=False))  # fmt: skip
        pixels[y0:y1, x0:x1] = rgb[rows[:, None], columns]


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
