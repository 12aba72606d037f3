"""Photos and videos of people, one folder per person, read with OpenCV as BGR pictures."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..files import is_text, shorten

PHOTO_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
VIDEO_SUFFIXES = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"))
FRAMES_TOLD = 0.95  # containers only estimate their number of frames; fewer than this share is a broken file


class UnreadableError(ValueError):
    """A file without pictures, or whose rest cannot be decoded."""


def list_people(photos: Path) -> dict[str, list[Path]]:
    """The people of a folder: {name of the person's folder: its files, also of folders within}, both sorted.

    Hidden files and folders (a leading dot) are left out.

    Raises:
        FileNotFoundError, NotADirectoryError: if photos is not a folder.
        ValueError: if it holds no folder with a photo or a video.
    """
    if not photos.exists():
        raise FileNotFoundError(f"{photos} does not exist; give the folder that holds one folder per person")
    if not photos.is_dir():
        raise NotADirectoryError(f"{photos} is a file; give the folder that holds one folder per person")
    people = {}
    if odd := [path.name for path in photos.iterdir() if path.is_dir() and not is_text(path.name)]:
        raise ValueError(f"{photos} has a folder whose name is not UTF-8, {shorten(odd[0])}; rename it, for it is the "
                         "person's name")  # fmt: skip
    for folder in sorted(path for path in photos.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = [path for path in folder.rglob("*") if path.is_file()
                 and not any(part.startswith(".") for part in path.relative_to(folder).parts)]  # fmt: skip
        people[folder.name] = sorted(files, key=lambda path: path.relative_to(folder).as_posix())
    if not any(is_picture(path) for files in people.values() for path in files):
        raise ValueError(f"{photos} holds no folder with photos ({' '.join(sorted(PHOTO_SUFFIXES))}) or videos "
                         f"({' '.join(sorted(VIDEO_SUFFIXES))}); make one folder per person")  # fmt: skip
    return people


def is_picture(path: Path) -> bool:
    """Whether the name is that of a photo or a video."""
    return path.suffix.lower() in PHOTO_SUFFIXES | VIDEO_SUFFIXES


def read_pictures(path: Path, frame_stride: int) -> Iterator[tuple[int | None, np.ndarray]]:
    """The picture of a photo, or every frame_stride-th frame of a video, turned upright as the file says.

    Yields:
        the frame's number (None for a photo) and the picture, (H, W, 3) uint8 BGR.

    Raises:
        UnreadableError: at once, or after the frames that could be read.
    """
    if path.suffix.lower() in VIDEO_SUFFIXES:
        yield from _read_video(path, frame_stride)
    elif path.suffix.lower() in PHOTO_SUFFIXES:
        yield None, _read_photo(path)
    else:
        raise UnreadableError(f"{path.suffix or 'a file without suffix'} is neither a photo nor a video")


def _read_photo(path: Path) -> np.ndarray:
    import cv2

    try:
        content = np.fromfile(path, np.uint8)  # cv2.imread knows neither errors nor, on Windows, all file names
    except OSError as error:
        raise UnreadableError(str(error)) from error
    picture = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    if picture is None:
        raise UnreadableError("not a photo that OpenCV can decode")
    return picture


def _read_video(path: Path, frame_stride: int) -> Iterator[tuple[int, np.ndarray]]:
    import cv2

    video = cv2.VideoCapture(str(path))
    try:
        count = 0
        while video.grab():
            if count % frame_stride == 0:
                decoded, picture = video.retrieve()
                if not decoded:
                    break
                yield count, picture
            count += 1
        told = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    finally:
        video.release()
    if not count:
        raise UnreadableError("not a video that OpenCV can decode")
    if count < FRAMES_TOLD * told:
        raise UnreadableError(f"decoding stopped after {count} of {told} frames")
