"""Are models tied to the renderer of their training people?  PYTHONPATH=data python benchmarks/second_renderer.py WORK

The same new people, poses, lights and keypoint errors drawn twice: by the kit's rasteriser, and by Mitsuba's path
tracer (soft shadows, light from skin to skin, glossy skins of other tones; pip install mitsuba, and the extra heads).
Both sets lie in WORK, which goes on where it stopped. What was trained on the rasteriser's other people is scored on
both, and nothing is chosen on them. Writes second_renderer.csv to data/results/controls; half an hour on two cores.
"""

import argparse
import multiprocessing
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from people.build import BuildConfig, Studio, write_files
from people.render import CAMERA_DISTANCE, PHOTO_FIELD, PHOTO_SIZE, HeadRenderer, project, rotation
from people.scenes import GAMMA
from torch import nn

from viewdiff_nb.faces import load_face_views
from viewdiff_nb.faces.crops import crop_transforms, cut_crops
from viewdiff_nb.faces.recogniser import MobileFaceNet, embed_crops
from viewdiff_nb.files import CONTROL_RESULTS, write_atomically
from viewdiff_nb.metrics import recognition_by_yaw
from viewdiff_nb.pretrained import load_pretrained
from viewdiff_nb.studies import adaptation
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.candidates import BASELINES, CLOSED_FORMS, as_enrolled
from viewdiff_nb.studies.tables import difference, rate_estimate
from viewdiff_nb.training import predict

CONFIG = BuildConfig(people=100, views=8, seed=77)
PATHS = 36  # a pixel
LAMP, LAMP_AT = 0.35, 2.0  # its radius and distance, metres
SETS, RAW = ("rasteriser", "path tracer"), "raw side view"


def path_tracer():
    """The module mitsuba, ready; whoever has none is told what to install."""
    try:
        import mitsuba
    except ModuleNotFoundError:
        sys.exit("error: the second renderer is Mitsuba's: pip install mitsuba")
    mitsuba.set_variant("scalar_rgb")
    mitsuba.set_log_level(mitsuba.LogLevel.Error)
    return mitsuba


class PathTraced(HeadRenderer):
    """A head whose crops are cut from a path-traced photo."""

    def __init__(self, plain: HeadRenderer, rng: np.random.Generator) -> None:
        self.mesh, self.keypoints = plain.mesh, plain.keypoints
        grey = plain._texture.mean(2, keepdims=True)
        toned = grey + (plain._texture - grey) * rng.uniform(0.6, 1.3)  # paler or ruddier
        toned = np.clip(toned * rng.uniform(0.8, 1.15) * rng.normal(1, 0.06, 3), 0, 1)
        self.mitsuba = path_tracer()
        self.skin = self.mitsuba.Bitmap(toned.astype(np.float32))
        self.roughness = float(rng.uniform(0.35, 0.6))
        rows = np.concatenate([plain.mesh.vertices, plain.mesh.normals, plain.mesh.uv], 1)
        names = ("x", "y", "z", "nx", "ny", "nz", "u", "v")
        head = "\n".join(
            ["ply", "format ascii 1.0", f"element vertex {len(rows)}"] + [f"property float {n}" for n in names]
        )
        head += f"\nelement face {len(plain.mesh.faces)}\nproperty list uchar int vertex_indices\nend_header\n"
        corners = "\n".join(f"3 {a} {b} {c}" for a, b, c in plain.mesh.faces)
        self.file = tempfile.NamedTemporaryFile("w", suffix=".ply")  # noqa: SIM115 # as long as the head is there
        self.file.write(head + "\n".join(" ".join(f"{x:.6g}" for x in row) for row in rows) + "\n" + corners + "\n")
        self.file.flush()

    def crops(self, angles, names, light, background, jitter):
        keypoints = project(self.keypoints, angles)[0] + jitter
        photo = self.photo(angles, light, background)
        return cut_crops(photo, crop_transforms(keypoints[:, :2], angles[1], names)), keypoints

    def photo(self, angles, light, background) -> np.ndarray:
        """(PHOTO_SIZE, PHOTO_SIZE, 3) uint8 stored RGB."""
        mitsuba, turn = self.mitsuba, np.eye(4)
        turn[:3, :3] = rotation(angles)
        transform, toward = mitsuba.ScalarTransform4f, np.array(light.direction) / np.linalg.norm(light.direction)
        radiance = (LAMP_AT / LAMP) ** 2 * np.array(light.colour) * (1 - light.ambient)
        skin = {"type": "bitmap", "bitmap": self.skin, "raw": True}
        scene = {
            "type": "scene",
            "integrator": {"type": "path", "max_depth": 4, "hide_emitters": True},
            "sensor": {
                "type": "perspective",
                "fov": float(np.rad2deg(2 * np.arctan(PHOTO_FIELD / 2 / CAMERA_DISTANCE))),
                "to_world": transform().look_at([0, 0, CAMERA_DISTANCE], [0, 0, 0], [0, -1, 0]),
                "film": {"type": "hdrfilm", "width": PHOTO_SIZE, "height": PHOTO_SIZE, "pixel_format": "rgba"},
                "sampler": {"type": "multijitter", "sample_count": PATHS},
            },
            "lamp": {
                "type": "sphere",
                "center": (LAMP_AT * toward).tolist(),
                "radius": LAMP,
                "emitter": {"type": "area", "radiance": {"type": "rgb", "value": radiance.tolist()}},
            },
            "sky": {"type": "constant", "radiance": {"type": "rgb", "value": light.ambient}},
            "head": {
                "type": "ply",
                "filename": self.file.name,
                "to_world": transform(turn.tolist()),
                "bsdf": {
                    "type": "twosided",
                    "bsdf": {"type": "principled", "base_color": skin, "roughness": self.roughness, "specular": 0.4},
                },
            },
        }
        drawn = np.array(mitsuba.render(mitsuba.load_dict(scene)))[:, ::-1]  # its x goes to the left
        behind = background.paint(PHOTO_SIZE)
        linear = np.clip(drawn[..., :3] + (1 - drawn[..., 3:4]) * behind, 0, 1)
        return np.rint(linear ** (1 / GAMMA) * 255).astype(np.uint8)


class PathTracingStudio(Studio):
    def renderer(self, seed, index):
        rng = np.random.default_rng(np.random.SeedSequence([seed, index, 2]))
        return PathTraced(super().renderer(seed, index), rng)


def part(folder: Path, name: str, index: int) -> Path:
    return folder / name / ".parts" / f"person_{index:05d}.npz"


def draw(folder: Path, name: str, share: range) -> None:
    """The files of some people, unless they are there."""
    studio = (Studio if name == SETS[0] else PathTracingStudio)()
    recogniser = MobileFaceNet()
    for index in share:
        if (path := part(folder, name, index)).is_file():
            continue
        found = studio.shoot(CONFIG.seed, index, CONFIG.views)
        arrays = {"features": embed_crops(recogniser, found.crops), "keypoints": found.keypoints, "poses": found.poses}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {key: value[None] for key, value in arrays.items()}
        write_atomically(path, lambda file, whole=whole: np.savez(file, **whole))


def models() -> dict[str, nn.Module]:
    """What was made of the shipped people; settings of closed forms by their validation people."""
    split, shipped = adaptation.load_split(), load_pretrained()
    found: dict[str, nn.Module] = {RAW: BASELINES[RAW](split.train)}
    for name, candidates in CLOSED_FORMS.items():
        of_settings = candidates(split.train.in_memory())
        rates = {
            setting: recognition_by_yaw(
                predict(model, split.val), as_enrolled(model, split.val).front, split.val.person, split.val.abs_yaw
            )["all"]["tar"]
            for setting, model in of_settings.items()
        }
        found[name] = of_settings[max(rates, key=rates.__getitem__)]
    return found | {"shipped weights, the whole step": shipped.model, "shipped weights": shipped}


def scores(folder: Path) -> pd.DataFrame:
    """A row per set, model, rate and bin, each model's difference from the raw embedding beside it."""
    rows, every = [], models()
    for name in SETS:
        faces = load_face_views(folder / name)
        results = {
            (model, 0): adaptation.score(predict(found, faces), as_enrolled(found, faces), "test")
            for model, found in every.items()
        }
        for model in every:
            for rate in ("rank1", "tar"):
                for yaw in ("all", "0-45", "45-90"):
                    e, gain = (
                        f(results, *of, rate, yaw) for f, of in ((rate_estimate, [model]), (difference, [model, RAW]))
                    )
                    about = {"renderer": name, "model": model, "rate": rate, "yaw": yaw, "mean": e.mean, "half": e.half}
                    rows.append(about | {"above raw": gain.mean, "its half": gain.half, "p": gain.p})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    path_tracer()
    context = multiprocessing.get_context("spawn")
    for name in SETS:
        jobs = [range(i, CONFIG.people, arguments.workers) for i in range(arguments.workers)]
        with context.Pool(arguments.workers) as pool:
            pool.map(partial(draw, arguments.work, name), jobs)
        parts = [part(arguments.work, name, index) for index in range(CONFIG.people)]
        write_files(arguments.work / name, CONFIG, parts, MobileFaceNet().name)
    found = scores(arguments.work)
    found.to_csv(CONTROL_RESULTS / "second_renderer.csv", index=False, float_format="%.5f")
    print(found.to_string(), machine(), sep="\n")


if __name__ == "__main__":
    main()
