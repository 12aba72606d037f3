"""Builds the data set of synthetic people: python -m people.build OUT --people 1800.

Each person is rendered once from the front and many times from the sides, every crop is embedded by
the recogniser, and the guide's six files are written: features, five 3-D keypoints and metadata of
the fronts (`front_*`) and of the side views (`video_*`). Equal seeds give equal bytes on one machine.
Work is kept in parts, so an interrupted build goes on where it stopped.
"""

import argparse
import json
import multiprocessing
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from viewdiff_nb.faces.crops import PROFILE_CROPS, check_crop_names, crops_of
from viewdiff_nb.faces.geometry import ARCFACE_TEMPLATE
from viewdiff_nb.faces.recogniser import MobileFaceNet, embed_crops
from viewdiff_nb.faces.views import CONVENTIONS, write_samples
from viewdiff_nb.files import only_writer, read_json, write_atomically, write_text

from .render import PHOTO_FIELD, PHOTO_SIZE, HeadRenderer
from .scenes import sample_background, sample_light

BUILDER_VERSION = "2"
CHUNK = 50  # people in one part
FRONT_SIGMA, FRONT_LIMIT = 2.0, 5.0  # degrees, every angle
PITCH_SIGMA, ROLL_SIGMA, TILT_LIMIT = 8.0, 6.0, 20.0  # degrees, side views
YAW_LIMIT = 90.0
# Error of the keypoint detector, as shares of the distance between the eyes: one pixel of the crop; depth.
JITTER_IMAGE = 1.0 / (ARCFACE_TEMPLATE[1][0] - ARCFACE_TEMPLATE[0][0])
JITTER_DEPTH = 0.02
KEYPOINT_DECIMALS = 3


@dataclass(frozen=True)
class BuildConfig:
    """What decides the content of the data set; crops: of profiles, see `viewdiff_nb.faces.crops`."""

    people: int = 1800
    views: int = 16
    seed: int = 0
    crops: tuple[str, ...] = PROFILE_CROPS
    chunk: int = CHUNK
    builder_version: str = BUILDER_VERSION

    def __post_init__(self):
        for name, low in (("people", 1), ("views", 1), ("seed", 0), ("chunk", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be a whole number of {low} or more, got {value!r}")
        check_crop_names(self.crops)


@dataclass(frozen=True)
class Samples:
    """One person's renders: the front first, then the side views by rising yaw.

    Attributes:
        crops: of each view (K, 112, 112, 3) uint8 RGB, one or more.
        keypoints: (1 + views, 5, 3) pixels of the notional photo, with the detector's error.
        poses: (1 + views, 3) pitch, yaw, roll in degrees, as rendered.
    """

    crops: list[np.ndarray]
    keypoints: np.ndarray
    poses: np.ndarray


def sample_poses(rng, views):
    """(1 + views, 3) pitch, yaw, roll in degrees: near the front, then one yaw from each stratum."""
    front = np.clip(rng.normal(0, FRONT_SIGMA, (1, 3)), -FRONT_LIMIT, FRONT_LIMIT)
    edges = np.linspace(-YAW_LIMIT, YAW_LIMIT, views + 1)
    yaw = rng.uniform(edges[:-1], edges[1:])
    pitch = np.clip(rng.normal(0, PITCH_SIGMA, views), -TILT_LIMIT, TILT_LIMIT)
    roll = np.clip(rng.normal(0, ROLL_SIGMA, views), -TILT_LIMIT, TILT_LIMIT)
    poses = np.concatenate([front, np.stack([pitch, yaw, roll], 1)])
    return np.round(poses, 2) + 0.0  # the files hold two decimals; + 0.0 turns -0 into 0


class Studio:
    """Makes people and renders them; holds what all people share."""

    def __init__(self):
        import torch

        from .heads import HeadModel
        from .skins import SkinPainter

        torch.set_num_threads(1)  # one order of summation, so equal bits
        self._model = HeadModel()
        self._painter = SkinPainter(self._model)

    def renderer(self, seed, index):
        """The `HeadRenderer` of person `index` of a data set."""
        rng = np.random.default_rng(np.random.SeedSequence([seed, index, 0]))
        person = self._model.sample_person(rng)
        vertices = self._model.vertices(person)
        return HeadRenderer(self._model.mesh(vertices), self._painter.paint(person), self._model.keypoints(vertices))

    def shoot(self, seed, index, views, crops=PROFILE_CROPS):
        """The `Samples` of person `index` of a data set, with these crops of profiles."""
        renderer = self.renderer(seed, index)
        rng = np.random.default_rng(np.random.SeedSequence([seed, index, 1]))
        poses = sample_poses(rng, views)
        eyes = renderer.keypoints[1] - renderer.keypoints[0]
        eye_distance = np.linalg.norm(eyes) * PHOTO_SIZE / PHOTO_FIELD  # pixels of the photo
        jitter_sigma = eye_distance * np.array([JITTER_IMAGE, JITTER_IMAGE, JITTER_DEPTH])
        shots = []
        for pose in poses:
            light, background = sample_light(rng), sample_background(rng)
            jitter = rng.normal(0, 1, (5, 3)) * jitter_sigma
            shots.append(renderer.crops(np.deg2rad(pose), crops_of(pose[1], crops), light, background, jitter))
        found, keypoints = zip(*shots, strict=True)
        return Samples(list(found), np.stack(keypoints), poses)


def build_part(job):
    """Make one part's file unless it is there; returns how many people it holds.

    Args:
        job: (config, index of the part, folder of the parts, callable that makes the recogniser).
    """
    config, part, folder, make_recogniser = job
    path = part_path(folder, part)
    people = range(part * config.chunk, min((part + 1) * config.chunk, config.people))
    if path.is_file():
        return len(people)
    tools = _tools(make_recogniser)
    features, keypoints, poses = [], [], []
    for index in people:
        samples = tools.studio.shoot(config.seed, index, config.views, config.crops)
        features.append(embed_crops(tools.recogniser, samples.crops))
        keypoints.append(samples.keypoints)
        poses.append(samples.poses)
    arrays = {"features": np.stack(features), "keypoints": np.stack(keypoints), "poses": np.stack(poses)}
    write_atomically(path, lambda file: np.savez(file, **arrays))
    return len(people)


@dataclass
class _Tools:
    studio: Studio
    recogniser: object


_tools_of = {}  # per process: loading the head model and the recogniser takes seconds


def _tools(make_recogniser):
    if make_recogniser not in _tools_of:
        _tools_of[make_recogniser] = _Tools(Studio(), make_recogniser())
    return _tools_of[make_recogniser]


def part_path(folder, part):
    """Path of a part's file."""
    return Path(folder) / f"part_{part:05d}.npz"


def claim_folder(folder, fingerprint):
    """Make the folder of parts, or check that its parts were made with the same configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "config.json"
    if not note.is_file():
        if any(folder.glob("part_*.npz")):
            raise ValueError(f"{folder} holds parts but no config.json: delete it or give another folder")
        write_text(note, json.dumps(fingerprint, indent=1) + "\n")
        return
    found = read_json(note, ValueError)
    if found != fingerprint:
        differences = [
            f"{key}: {found.get(key)!r} there, {fingerprint.get(key)!r} now"
            for key in sorted(found.keys() | fingerprint.keys())
            if found.get(key) != fingerprint.get(key)
        ]
        raise ValueError(
            f"{folder} holds parts of another build ({'; '.join(differences)}): "
            "finish that build, delete the folder, or give another one"
        )


def crop_alone():
    """The recogniser of 192 numbers."""
    return MobileFaceNet(mirrored=False)


RECOGNISERS = {"mobilefacenet": MobileFaceNet, "mobilefacenet192": crop_alone}


def build(out, config=BuildConfig(), workers=1, work=None, make_recogniser=MobileFaceNet):
    """Build a data set.

    Args:
        out: folder for the six files.
        config: the `BuildConfig`.
        workers: processes that share the work; they do not change the result.
        work: folder for the parts, kept afterwards; default `out/.parts`, removed when all is written.
        make_recogniser: called without arguments in each process; gives an object with `name`, `feature_dim`
            and `embed(crops (N, 112, 112, 3) uint8) -> (N, feature_dim) float32`.
    """
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    with only_writer(out, "OUT") as folder:
        _build(folder, config, workers, work, make_recogniser)


def _build(out, config, workers, work, make_recogniser):
    folder = Path(work) if work else out / ".parts"
    name = make_recogniser().name
    fingerprint = json.loads(json.dumps(asdict(config) | {"recogniser": name}))  # as the file has it
    claim_folder(folder, fingerprint)
    parts = range(-(-config.people // config.chunk))
    jobs = [(config, part, folder, make_recogniser) for part in parts]
    with tqdm(total=config.people, unit="person", desc="people") as bar:
        if workers == 1:
            for job in jobs:
                bar.update(build_part(job))
        else:
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                for count in pool.imap_unordered(build_part, jobs):
                    bar.update(count)
    write_files(out, config, [part_path(folder, part) for part in parts], name)
    if not work:
        shutil.rmtree(folder)


def write_files(out, config, parts, recogniser):
    """Join the parts and write the six files."""
    arrays = {"features": [], "keypoints": [], "poses": []}
    for path in parts:
        with np.load(path, allow_pickle=False) as part:
            # as the files hold them, so that 20,000 people fit into a GB
            arrays["features"].append(part["features"].astype(np.float16))
            arrays["keypoints"].append(np.round(part["keypoints"], KEYPOINT_DECIMALS).astype(np.float32))
            arrays["poses"].append(part["poses"])
    features, keypoints, poses = (np.concatenate(values) for values in arrays.values())
    names = [f"person_{index:04d}" for index in range(config.people)]
    info = standard_info(config, recogniser)
    views = {"front": slice(0, 1), "video": slice(1, None)}
    for kind, columns in views.items():
        entries = [{"person_name": name} for name in names for _ in range(poses[:, columns].shape[1])]
        flat = (array[:, columns].reshape(-1, *array.shape[2:]) for array in (features, keypoints, poses))
        write_samples(out, kind, *flat, entries, info)


def standard_info(config, recogniser):
    """What the metadata says about conventions and origin."""
    return {
        "content": "synthetic people only",
        "recogniser": recogniser,
        "feature": "float16, norm 1",
        **CONVENTIONS,
        "keypoint_unit": f"pixels of a {PHOTO_SIZE} x {PHOTO_SIZE} photo from which the crop was cut",
        "builder_version": config.builder_version,
        "seed": config.seed,
        "people": config.people,
        "views_per_person": config.views,
        "crops_of_profiles": list(config.crops),
    }


def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m people.build", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", help="folder for the six files")
    parser.add_argument("--people", type=int, default=BuildConfig.people)
    parser.add_argument("--views", type=int, default=BuildConfig.views, help="side views of each person")
    parser.add_argument("--seed", type=int, default=BuildConfig.seed)
    parser.add_argument("--recogniser", choices=RECOGNISERS, default="mobilefacenet", help="what embeds the crops")
    parser.add_argument(
        "--crops", nargs="+", default=BuildConfig.crops, help="crops of profiles, e.g. five@1 three@1.12"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work")
    parser.add_argument("--work", type=Path, help="folder for the parts, kept afterwards; default OUT/.parts, removed")
    parser.add_argument("--sheet", type=Path, help="only draw people 0..11 of this seed into this PNG")
    options = parser.parse_args(arguments)
    if options.sheet:
        from .sheet import draw_sheet

        draw_sheet(options.sheet, Studio(), options.seed)
        return
    if options.out is None:
        parser.error("give the folder for the six files, or --sheet PATH")
    try:
        config = BuildConfig(people=options.people, views=options.views, seed=options.seed, crops=tuple(options.crops))
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    build(options.out, config, options.workers, options.work, RECOGNISERS[options.recogniser])


if __name__ == "__main__":
    main()
