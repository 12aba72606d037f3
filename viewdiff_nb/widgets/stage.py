"""A picture in a notebook that can be turned by hand and asked for its values: the front end of the explorers."""

from pathlib import Path

import anywidget
import traitlets

HERE = Path(__file__).parent


class Stage(anywidget.AnyWidget):
    """Shows a picture that Python draws; says where it is dragged, and shows the values under the pointer.

    A picture replaces the one before without flicker, when it is decoded; one that comes late is dropped. When the
    kernel is gone the stage says so and what to do. Arrow keys do what dragging does.

    Traits:
        picture: a PNG or WebP.
        width: of the picture on the page, CSS pixels.
        label: what the picture shows, for screen readers; caption: a line below it.
        turnable: whether it can be dragged.
        turned: degrees dragged so far, [to the right, down]; grows, so that no step is lost when steps are merged.
        grids: what can be read off: each {"box": [left, top, right, bottom] in 0..1 from the top left corner,
            "rows": n, "columns": m, "texts": n m strings, row by row}.
    """

    _esm = HERE / "stage.js"
    _css = HERE / "stage.css"
    picture = traitlets.Bytes(b"").tag(sync=True)
    width = traitlets.Int(240).tag(sync=True)
    label = traitlets.Unicode("").tag(sync=True)
    caption = traitlets.Unicode("").tag(sync=True)
    turnable = traitlets.Bool(False).tag(sync=True)
    degrees_per_pixel = traitlets.Float(0.5).tag(sync=True)
    degrees_per_key = traitlets.List([5.0, 10.0]).tag(sync=True)  # right and left, up and down
    turned = traitlets.List([0.0, 0.0]).tag(sync=True)
    grids = traitlets.List([]).tag(sync=True)
