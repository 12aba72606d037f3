"""Photos and videos of people, one folder per person, and what InsightFace reads off one face of a picture."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from viewdiff_nb.faces.crops import CROP_SIZE, PROFILE_CROPS, check_crop_names, crop_transforms, crops_of
from viewdiff_nb.files import install_hint, is_text, shorten

PHOTO_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
VIDEO_SUFFIXES = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"))
COMPLETE = 0.95  # share of a video's frames that must be decoded: containers only estimate their number
TASKS = ("detection", "landmark_3d_68", "recognition")
# Of the 68 points: the corners of each eye (their middle counts), the tip of the nose, the corners of the mouth.
FIVE_OF_68 = ((36, 39), (42, 45), (30,), (48,), (54,))
FACE_ROWS, FACE_COLUMNS = slice(16, 104), slice(20, 92)  # of the 112 x 112 crop: without its background


@dataclass(frozen=True)
class EmbedOptions:
    """How to embed. Field names are the flags of the command line."""

    i_have_consent: bool = False
    """Confirms that every person shown has agreed to this use of their biometric data."""
    models: Path | None = None
    """InsightFace's root folder with models/PACK/*.onnx; nothing is downloaded then."""
    pack: str = "buffalo_l"
    """InsightFace model pack with a 3-D landmark model."""
    device: Literal["cpu", "cuda"] = "cpu"
    frame_stride: int = 10
    """Every how many-th frame of a video is used."""
    det_size: int = 640
    """Side of the square that pictures are scaled into for detection, pixels; a multiple of 32."""
    det_threshold: float = 0.5
    """Smallest detection score."""
    min_face: int = 60
    """Shorter side of a face's box from which on it counts, pixels."""
    max_faces: int = 1
    """Pictures with more faces that count are refused, as nobody can say whose folder it is. The largest is used."""
    min_sharpness: float = 10.0
    """Smallest variance of the Laplacian of the aligned crop; crops blurred by about 1.5 pixels have 10."""
    front_angle: float = 15.0
    """A front looks at most this far past the camera, degrees."""
    crops: tuple[str, ...] = PROFILE_CROPS
    """Crops of a profile whose embeddings are averaged; five@1 is InsightFace's own, which all other views have."""

    def __post_init__(self) -> None:
        check_crop_names(self.crops)
        checks = {
            "frame_stride": (self.frame_stride >= 1, "be 1 or more"),
            "det_size": (self.det_size >= 1 and self.det_size % 32 == 0, "be a multiple of 32 from 32 on"),
            "det_threshold": (0 < self.det_threshold < 1, "be between 0 and 1"),
            "min_face": (self.min_face >= 1, "be 1 or more"),
            "max_faces": (self.max_faces >= 1, "be 1 or more"),
            "min_sharpness": (self.min_sharpness >= 0, "not be negative"),
            "front_angle": (0 < self.front_angle <= 90, "be above 0 and at most 90 degrees"),
        }
        for name, (fits, wanted) in checks.items():
            if not fits:
                raise ValueError(f"{name} must {wanted}, got {getattr(self, name)}")


class RefusedError(ValueError):
    """A file that cannot be read, or a picture without a usable face; reason is a short key, the message says more."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def list_people(photos: Path) -> dict[str, list[Path]]:
    """{name of a person's folder: its files, also of folders within}, both sorted, without hidden ones (a leading dot).

    Raises:
        FileNotFoundError, NotADirectoryError: if photos is not a folder.
        ValueError: if it holds no folder with a photo or a video, or one whose name is not UTF-8.
    """
    if not photos.is_dir():
        kind, problem = (NotADirectoryError, "is a file") if photos.exists() else (FileNotFoundError, "does not exist")
        raise kind(f"{photos} {problem}; give the folder that holds one folder per person")
    people = {}
    for folder in sorted(path for path in photos.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if not is_text(folder.name):
            odd = f"{photos} has a folder whose name is not UTF-8, {shorten(folder.name)}"
            raise ValueError(f"{odd}; rename it, for it is the person's name")
        paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
        shown = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
        people[folder.name] = [paths[path] for path in sorted(shown, key=Path.as_posix)]
    if not any(path.suffix.lower() in PHOTO_SUFFIXES | VIDEO_SUFFIXES for files in people.values() for path in files):
        raise ValueError(
            f"{photos} holds no folder with photos ({' '.join(sorted(PHOTO_SUFFIXES))}) or videos "
            f"({' '.join(sorted(VIDEO_SUFFIXES))}); make one folder per person"
        )
    return people


def read_pictures(path: Path, frame_stride: int) -> Iterator[tuple[int | None, np.ndarray]]:
    """The picture of a photo, or every frame_stride-th frame of a video, turned upright as the file says.

    Yields:
        the frame's number (None for a photo) and the picture, (H, W, 3) uint8 BGR.

    Raises:
        RefusedError: at once, or after the frames that could be read.
    """
    import cv2

    if path.suffix.lower() in VIDEO_SUFFIXES:
        yield from _read_video(path, frame_stride)
        return
    if path.suffix.lower() not in PHOTO_SUFFIXES:
        raise RefusedError("not_a_picture", f"neither a photo nor a video: {path.name}")
    try:
        content = np.fromfile(path, np.uint8)  # cv2.imread knows neither errors nor, on Windows, all file names
    except OSError as error:
        raise RefusedError("read_error", str(error)) from error
    picture = cv2.imdecode(content, cv2.IMREAD_COLOR) if len(content) else None
    if picture is None:
        raise RefusedError("read_error", "not a photo that OpenCV can decode")
    yield None, picture


def _read_video(path: Path, frame_stride: int) -> Iterator[tuple[int, np.ndarray]]:
    import cv2

    video, count = cv2.VideoCapture(str(path)), 0
    while video.grab():
        if count % frame_stride == 0:
            decoded, picture = video.retrieve()
            if not decoded:
                break
            yield count, picture
        count += 1
    expected = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    if not count:
        raise RefusedError("read_error", "not a video that OpenCV can decode")
    if count < COMPLETE * expected:
        raise RefusedError("read_error", f"decoding stopped after {count} of {expected} frames")


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


class FaceReader:
    """InsightFace's detector, 3-D landmarks and recogniser of one model pack.

    Raises:
        ImportError: without InsightFace.
        FileNotFoundError: if options.models lacks the pack.
        ValueError: if the pack lacks one of the three models.
    """

    def __init__(self, options: EmbedOptions) -> None:
        try:
            import cv2  # noqa: F401
            from insightface.app import FaceAnalysis
        except ImportError as error:
            raise ImportError(
                f"embedding photos needs InsightFace: {install_hint('insightface')} ({error}). If libGL is what is "
                "missing, install it, or run: pip install --force-reinstall --no-deps opencv-python-headless"
            ) from error
        pack, cuda = options.pack, options.device == "cuda"
        if options.models is not None:
            folder = Path(options.models).expanduser().resolve() / "models" / pack
            if not list(folder.glob("*.onnx")):
                remedy = f"put the model pack {pack} there, or leave out --models and InsightFace downloads it"
                raise FileNotFoundError(f"{folder} holds no .onnx file; {remedy}")
            pack = str(folder)  # InsightFace takes a path as it is
        providers = ["CUDAExecutionProvider"] * cuda + ["CPUExecutionProvider"]
        app = FaceAnalysis(pack, allowed_modules=list(TASKS), providers=providers)
        if missing := [task for task in TASKS if task not in app.models]:
            lacking = f"the model pack {options.pack} has no {', '.join(missing)}"
            raise ValueError(f"{lacking}; use one that has, such as buffalo_l")
        det_size = options.det_size, options.det_size
        app.prepare(ctx_id=0 if cuda else -1, det_thresh=options.det_threshold, det_size=det_size)
        self._options, self._models = options, app.models
        files = {task: Path(app.models[task].model_file) for task in TASKS}
        self.checksums = {task: hashlib.sha256(path.read_bytes()).hexdigest() for task, path in files.items()}
        self.name = f"InsightFace {options.pack} ({files['recognition'].name})"

    def read(self, picture: np.ndarray) -> Face:
        """The largest face of a (H, W, 3) uint8 BGR picture.

        Landmarks and embedding are computed of this face only: bystanders have not agreed to theirs.

        Raises:
            RefusedError: saying why there is no usable face.
        """
        from insightface.app.common import Face as Found

        smallest, most, sharp = self._options.min_face, self._options.max_faces, self._options.min_sharpness
        boxes, points = self._models["detection"].detect(picture, max_num=0, metric="default")
        if not len(boxes):
            raise RefusedError("no_face_detected", "no face was found")
        sides = boxes[:, 2:4] - boxes[:, :2]
        large = sides.min(1) >= smallest
        if not large.any():
            widest = f"the largest face is {sides.min(1).max():.0f} pixels wide or high"
            raise RefusedError("face_too_small", f"{widest}; it must have {smallest}")
        if large.sum() > most:
            raise RefusedError("several_faces", f"{large.sum()} faces, at most {most} may be in a picture")
        kept = int(np.where(large, sides.prod(1), 0).argmax())
        face = Found(bbox=boxes[kept, :4], kps=points[kept], det_score=boxes[kept, 4])
        sharpness = _crop_sharpness(picture, face.kps)
        if sharpness < sharp:
            raise RefusedError("too_blurry", f"sharpness is {sharpness:.1f}, it must be {sharp:g}")
        self._models["landmark_3d_68"].get(picture, face)
        points_68 = np.asarray(face.landmark_3d_68, np.float64)
        keypoints = np.stack([points_68[list(rows)].mean(0) for rows in FIVE_OF_68])
        # InsightFace decomposes R = Rz(roll) Ry(yaw) Rx(pitch) with its mean face's x to the right, y down and nose
        # at +z (insightface/utils/transform.py, matrix2angle; data/objects/meanshape_68.pkl). These are the
        # conventions of viewdiff_nb.faces.geometry, so neither order nor sign changes.
        pose = np.asarray(face.pose, np.float64)
        embedding = self._embed(picture, face.kps, pose[1])
        if not all(np.isfinite(values).all() for values in (keypoints, pose, embedding)) or not embedding.any():
            raise RefusedError("not_finite", "InsightFace gave numbers that are not finite, or a zero embedding")
        return Face(embedding, keypoints.astype(np.float32), pose, sharpness)

    def _embed(self, picture: np.ndarray, points: np.ndarray, yaw: float) -> np.ndarray:
        """(D,) the mean embedding of the view's crops, cut as InsightFace's norm_crop does."""
        import cv2

        names = crops_of(yaw, self._options.crops)
        transforms = crop_transforms(points, yaw, names)
        crops = [cv2.warpAffine(picture, transform, (CROP_SIZE, CROP_SIZE)) for transform in transforms]
        return np.asarray(self._models["recognition"].get_feat(crops), np.float32).mean(0)


def _crop_sharpness(picture: np.ndarray, points: np.ndarray) -> float:
    """`Face.sharpness` of a picture (H, W, 3) with the detector's keypoints (5, 2)."""
    import cv2
    from insightface.utils.face_align import norm_crop

    grey = cv2.cvtColor(norm_crop(picture, points, 112), cv2.COLOR_BGR2GRAY)
    return float(cv2.Laplacian(grey[FACE_ROWS, FACE_COLUMNS], cv2.CV_64F).var())
