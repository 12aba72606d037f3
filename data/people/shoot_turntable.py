"""Makes a turntable of people of the shipped set: python -m people.shoot_turntable OUT.

Light stays with the camera and the background is plain, so that only the pose changes from picture to picture.
Keypoints carry no detector's error. Needs what builds the face set (the extra heads, and npm for the recogniser).
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from viewdiff_nb.faces.crops import crops_of
from viewdiff_nb.faces.recogniser import MobileFaceNet, embed_crops
from viewdiff_nb.faces.views import CONVENTIONS
from viewdiff_nb.files import write_atomically, write_text

from .render import PHOTO_FIELD, PHOTO_SIZE

QUALITY = 82  # of the WebP sheets
PEOPLE = (7, 12, 40, 59, 81, 97, 103, 116)  # among the test people of the default split


@dataclass(frozen=True)
class TurntableConfig:
    """What decides the content of a turntable.

    people: indices of people of the set that `seed` makes.
    pitches, yaws: degrees.
    picture_size: side of a picture in pixels; picture_field: metres that it shows at the pivot.
    """

    people: tuple[int, ...] = PEOPLE
    seed: int = 0
    pitches: tuple[float, ...] = tuple(range(-20, 21, 10))
    yaws: tuple[float, ...] = tuple(range(-90, 91, 5))
    picture_size: int = 192
    picture_field: float = 0.34

    def __post_init__(self) -> None:
        for name, limit in (("pitches", 60), ("yaws", 90)):
            values = getattr(self, name)
            if list(values) != sorted(set(values)) or not values or max(map(abs, values)) > limit:
                raise ValueError(f"{name} must rise and stay within ±{limit} degrees, got {values}")
        if not self.people or min(self.people) < 0:
            raise ValueError(f"people must be indices from 0 on, got {self.people}")


def shoot_turntable(out: str | Path, studio, recogniser, config: TurntableConfig = TurntableConfig()) -> None:
    """Render and embed every person at every pose.

    Args:
        out: folder for the files.
        studio: a `build.Studio`.
        recogniser: as `build.build` wants it, made.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    size, features, keypoints = config.picture_size, [], []
    names = [f"person_{index:04d}" for index in config.people]
    for index, name in zip(config.people, tqdm(names, unit="person"), strict=True):
        renderer = studio.renderer(config.seed, index)
        sheet = Image.new("RGB", (size * len(config.yaws), size * len(config.pitches)))
        shot, points = [], []
        for row, pitch in enumerate(config.pitches):
            for column, yaw in enumerate(config.yaws):
                angles = np.deg2rad([pitch, yaw, 0.0])
                picture, _ = renderer.picture(angles, size=size, field=config.picture_field)
                sheet.paste(Image.fromarray(picture), (column * size, row * size))
                crops, found = renderer.crops(angles, crops_of(yaw))
                shot.append(crops)
                points.append(found)
        sheet.save(out / f"{name}.webp", quality=QUALITY, method=6)
        features.append(embed_crops(recogniser, shot))
        keypoints.append(np.stack(points))
    grid = len(names), len(config.pitches), len(config.yaws)
    arrays = {
        "features.npy": np.stack(features).reshape(*grid, -1).astype(np.float16),
        "keypoints.npy": np.stack(keypoints).reshape(*grid, 5, 3).round(3).astype(np.float32),
    }
    for name, values in arrays.items():
        write_atomically(out / name, lambda file, values=values: np.save(file, values))
    about = {
        "content": "synthetic people only",
        "recogniser": recogniser.name,
        "feature_dim": features[0].shape[1],
        "people": names,
        "seed": config.seed,
        "pitches": list(config.pitches),
        "yaws": list(config.yaws),
        "photo_size": PHOTO_SIZE,
        "picture_size": size,
        "pixels_per_photo_pixel": (size / config.picture_field) / (PHOTO_SIZE / PHOTO_FIELD),
        **CONVENTIONS,
    }
    write_text(out / "metadata.json", json.dumps(about, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m people.shoot_turntable", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the files")
    options = parser.parse_args(arguments)
    from .build import Studio

    shoot_turntable(options.out, Studio(), MobileFaceNet())


if __name__ == "__main__":
    main()
