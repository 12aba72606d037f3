"""A contact sheet of synthetic people: a row a person, the front and side views by yaw."""

import numpy as np
from PIL import Image, ImageDraw

from viewdiff_nb.faces.crops import CROP_SIZE

SHEET_PEOPLE = 12
SHEET_VIEWS = 8


def draw_sheet(path, studio, seed=0, people=SHEET_PEOPLE, views=16):
    """Draw the first people of a data set, as the recogniser sees them (of several crops the first).

    Args:
        path: PNG file to write.
        studio: the `Studio` that makes the data set's people.
        seed: the data set's seed.
        people: how many people, from person 0 on.
        views: side views a person in the data set; `SHEET_VIEWS` of them, evenly spaced, are drawn.
    """
    if views < SHEET_VIEWS:
        raise ValueError(f"a sheet shows {SHEET_VIEWS} side views a person, the data set has {views}")
    columns = [0, *(1 + np.linspace(0, views - 1, SHEET_VIEWS).round().astype(int))]
    sheet = Image.new("RGB", (CROP_SIZE * len(columns), CROP_SIZE * people))
    draw = ImageDraw.Draw(sheet)
    for index in range(people):
        samples = studio.shoot(seed, index, views)
        for place, column in enumerate(columns):
            corner = (place * CROP_SIZE, index * CROP_SIZE)
            sheet.paste(Image.fromarray(samples.crops[column][0]), corner)
            label = f"{samples.poses[column, 1]:+.0f}°"
            draw.text((corner[0] + 3, corner[1] + 1), label, "white", stroke_width=1, stroke_fill="black")
    sheet.save(path, optimize=True)
