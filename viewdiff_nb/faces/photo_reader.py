"""One face of a picture through InsightFace: detection, sharpness, five 3-D keypoints, pose, embedding."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from viewdiff_nb.files import install_hint, is_text, shorten

TASKS = ("detection", "landmark_3d_68", "recognition")
# Of the 68 points: the corners of each eye (their middle counts), the tip of the nose, the corners of the mouth.
FIVE_OF_68 = ((36, 39), (42, 45), (30,), (48,), (54,))
FACE_ROWS, FACE_COLUMNS = slice(16, 104), slice(20, 92)  # of the 112 x 112 crop: without its background


class RefusedError(ValueError):
    """A picture without a usable face. `reason` is a short key, the message says more."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Face:
    """What InsightFace reads off one face.

    embedding: (D,) as the recogniser gives it, not normalised.
    keypoints: (5, 3) pixels of the picture in `KEYPOINT_NAMES` order; x right, y down, z toward the camera.
    pose: (3,) pitch, yaw, roll in degrees.
    sharpness: variance of the Laplacian of the aligned crop's grey values (0..255) where the face is.
    """

    embedding: np.ndarray
    keypoints: np.ndarray
    pose: np.ndarray
    sharpness: float


def import_insightface():
    """InsightFace's FaceAnalysis, or one message that says how to get it."""
    try:
        import cv2  # noqa: F401
        from insightface.app import FaceAnalysis
    except ImportError as error:
        raise ImportError(
            f"embedding photos needs InsightFace: {install_hint('insightface')} ({error}). If libGL is what is "
            "missing, install it, or run: pip install --force-reinstall --no-deps opencv-python-headless"
        ) from error
    return FaceAnalysis


class FaceReader:
    """InsightFace's detector, 3-D landmarks and recogniser of one model pack.

    Args:
        models: InsightFace's root folder, with models/PACK/*.onnx in it; nothing is downloaded then. None:
            ~/.insightface, to which InsightFace downloads the pack if it is not there.
        pack: name of the model pack.
        det_size: side of the square that pictures are scaled into for detection, in pixels.
        det_threshold: smallest detection score.
        min_face: shorter side of a face's box from which on it counts, in pixels.
        max_faces: a picture with more faces that count is ambiguous, and refused.
        min_sharpness: see `Face.sharpness`.
        device: "cpu" or "cuda".

    Raises:
        ImportError: without InsightFace.
        FileNotFoundError: if models lacks the pack.
        ValueError: if the pack lacks one of the three models.
    """

    def __init__(
        self,
        models: Path | None = None,
        pack: str = "buffalo_l",
        det_size: int = 640,
        det_threshold: float = 0.5,
        min_face: int = 60,
        max_faces: int = 1,
        min_sharpness: float = 10.0,
        device: str = "cpu",
    ) -> None:
        analysis = import_insightface()
        where = {"name": pack}
        if models is not None:
            folder = Path(models).expanduser().resolve() / "models" / pack
            if not list(folder.glob("*.onnx")):
                raise FileNotFoundError(
                    f"{folder} holds no .onnx file; put the model pack {pack} there, or leave out "
                    "--models and InsightFace downloads it"
                )
            where["name"] = str(folder)  # a path is taken as it is
        providers = ["CUDAExecutionProvider"] * (device == "cuda") + ["CPUExecutionProvider"]
        app = analysis(**where, allowed_modules=list(TASKS), providers=providers)
        if missing := [task for task in TASKS if task not in app.models]:
            raise ValueError(f"the model pack {pack} has no {', '.join(missing)}; use one that has, such as buffalo_l")
        app.prepare(ctx_id=-1 if device == "cpu" else 0, det_thresh=det_threshold, det_size=(det_size, det_size))
        self._models = app.models
        self._min_face, self._max_faces, self._min_sharpness = min_face, max_faces, min_sharpness
        files = {task: Path(app.models[task].model_file) for task in TASKS}
        self.checksums = {task: hashlib.sha256(path.read_bytes()).hexdigest() for task, path in files.items()}
        self.name = f"InsightFace {pack} ({files['recognition'].name})"

    def read(self, picture: np.ndarray) -> Face:
        """The largest face of a (H, W, 3) uint8 BGR picture.

        Landmarks and embedding are computed of this face only: bystanders have not agreed to theirs.

        Raises:
            RefusedError: saying why there is no usable face.
        """
        from insightface.app.common import Face as Found

        boxes, points = self._models["detection"].detect(picture, max_num=0, metric="default")
        if not len(boxes):
            raise RefusedError("no_face_detected", "no face was found")
        sides = boxes[:, 2:4] - boxes[:, :2]
        large = sides.min(1) >= self._min_face
        if not large.any():
            raise RefusedError(
                "face_too_small",
                f"the largest face is {sides.min(1).max():.0f} pixels wide or high; it must have {self._min_face}",
            )
        if large.sum() > self._max_faces:
            raise RefusedError("several_faces", f"{large.sum()} faces, at most {self._max_faces} may be in a picture")
        kept = int(np.where(large, sides.prod(1), 0).argmax())
        face = Found(bbox=boxes[kept, :4], kps=points[kept], det_score=boxes[kept, 4])
        sharpness = crop_sharpness(picture, face.kps)
        if sharpness < self._min_sharpness:
            raise RefusedError("too_blurry", f"sharpness is {sharpness:.1f}, it must be {self._min_sharpness:g}")
        for task in TASKS[1:]:
            self._models[task].get(picture, face)
        points_68 = np.asarray(face.landmark_3d_68, np.float64)
        keypoints = np.stack([points_68[list(rows)].mean(0) for rows in FIVE_OF_68])
        # InsightFace decomposes R = Rz(roll) Ry(yaw) Rx(pitch) with its mean face's x to the right, y down and nose
        # at +z (insightface/utils/transform.py, matrix2angle; data/objects/meanshape_68.pkl). These are the
        # conventions of viewdiff_nb.faces.geometry, so neither order nor sign changes.
        pose = np.asarray(face.pose, np.float64)
        embedding = np.asarray(face.embedding, np.float32)
        if not all(np.isfinite(values).all() for values in (keypoints, pose, embedding)) or not embedding.any():
            raise RefusedError("not_finite", "InsightFace gave numbers that are not finite, or a zero embedding")
        return Face(embedding, keypoints.astype(np.float32), pose, sharpness)


def crop_sharpness(picture: np.ndarray, points: np.ndarray) -> float:
    """Variance of the Laplacian of the crop that the recogniser sees, see `Face.sharpness`.

    Args:
        picture: (H, W, 3) uint8 BGR.
        points: (5, 2) the detector's keypoints.
    """
    import cv2
    from insightface.utils.face_align import norm_crop

    grey = cv2.cvtColor(norm_crop(picture, points, 112), cv2.COLOR_BGR2GRAY)
    return float(cv2.Laplacian(grey[FACE_ROWS, FACE_COLUMNS], cv2.CV_64F).var())


# ---- Photos and videos of people, one folder per person, read with OpenCV as BGR pictures.


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
        raise ValueError(
            f"{photos} has a folder whose name is not UTF-8, {shorten(odd[0])}; rename it, for it is the person's name"
        )
    for folder in sorted(path for path in photos.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = [
            path
            for path in folder.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        ]
        people[folder.name] = sorted(files, key=lambda path: path.relative_to(folder).as_posix())
    if not any(is_picture(path) for files in people.values() for path in files):
        raise ValueError(
            f"{photos} holds no folder with photos ({' '.join(sorted(PHOTO_SUFFIXES))}) or videos "
            f"({' '.join(sorted(VIDEO_SUFFIXES))}); make one folder per person"
        )
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
