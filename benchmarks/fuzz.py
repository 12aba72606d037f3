"""Files of a stranger: every loader reads mutated files, and must succeed or say in the kit's own words what is wrong.

    python benchmarks/fuzz.py [LOADER ...] [--inputs 2000] [--seed 0]

An input is a valid file with one to three mutations: bytes flipped, cut, repeated, set to extremes; where the format is
known, also values of its JSON, dtype and shape in a .npy header, entries of a zip archive, numbers and names in lines;
or a pickle that would run a command. An input fails if it raises anything but the kit's error that names the folder,
takes more than ten seconds or 2 GB, or runs the pickle. What failed is printed, and kept in runs/fuzz/LOADER.
"""

import argparse
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from viewdiff_nb.drop_in import DropIn
from viewdiff_nb.faces import load_face_views, split_by_person
from viewdiff_nb.faces.cfp import read_landmarks, read_pictures, read_protocol
from viewdiff_nb.faces.pairs import read_insightface_bin, read_pairs, read_picture_pairs, write_pairs
from viewdiff_nb.faces.splits import load_split_file, save_split
from viewdiff_nb.faces.turntable import load_turntable
from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.files import RUNS
from viewdiff_nb.modules.adapters import load_adapter, load_peft_adapter, save_adapter, save_peft_adapter
from viewdiff_nb.predict import PredictOptions, predict_file
from viewdiff_nb.pretrained import load_drop_in, save_drop_in
from viewdiff_nb.studies.ablation import COLUMNS, read_cells
from viewdiff_nb.studies.store import Store
from viewdiff_nb.training import TrainConfig
from viewdiff_nb.training.checkpoint import build_model, load_checkpoint, load_model, save_checkpoint, save_weights

SECONDS, MEMORY = 10, 2 * 2**30
SMALL = {"d_model": 8, "nhead": 2, "num_layers": 1, "dim_feedforward": 8, "voxel_resolution": 4}
EXTREMES = (0, 1, -1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 10**400)
ODD = [
    *EXTREMES,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    None,
    True,
    "",
    "../../x",
    "\ud800",
    "李雷\0",
    [],
    {},
    [[[[]]]],
]
ODD += ["x" * 10_000, "9" * 5000, {"__proto__": 1}, list(range(1000))]
TEMPORARY = Path(tempfile.gettempdir()) / f"viewdiff_nb_fuzz_{os.getpid()}"
CANARY = TEMPORARY / "ran"


class Run:
    """A pickle of it runs a command when it is loaded."""

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{CANARY}'",)


@dataclass
class Loader:
    """make: writes valid files into a folder; read: what is tested, of that folder."""

    make: Callable[[Path], None]
    read: Callable[[Path], object]


# ---- valid files


def people(count: int = 6, views: int = 3, width: int = 6) -> FaceViews:
    generator = torch.Generator().manual_seed(0)
    names = tuple(f"person_{i}" for i in range(count))
    person = torch.arange(count).repeat_interleave(views)
    shapes = (count, width), (count * views, width), (count * views, 5, 3), (count * views, 3)
    front, src, points, angles = (torch.randn(shape, generator=generator) for shape in shapes)
    return FaceViews(names, front, src, points, angles, person)


def face_set(folder: Path) -> None:
    faces = people()
    owners = [faces.names[i] for i in faces.person]
    for kind, features, points, angles, names in (
        ("front", faces.front, torch.zeros(6, 5, 3), torch.zeros(6, 3), list(faces.names)),
        ("video", faces.src, faces.keypoints_3d, faces.angles.rad2deg(), owners),
    ):
        for what, values in (("feature", features), ("keypoints", points)):
            np.save(folder / f"{kind}_{what}.npy", values.numpy())
        about = {"num_samples": len(features), "feature_dim": 6, "standard_info": {}, "poses": angles.tolist()}
        about["metadata"] = [{"person_name": name} for name in names]
        (folder / f"{kind}_metadata.json").write_text(json.dumps(about))


def model_of(**options: object) -> tuple[torch.nn.Module, TrainConfig]:
    config = TrainConfig(**SMALL, **options)  # type: ignore[arg-type]
    torch.manual_seed(0)
    return build_model(config, 6), config


def lora() -> torch.nn.Module:
    model, _ = model_of(use_lora_attention=True, rank=2)
    return model


def checkpoint(folder: Path) -> None:
    model, config = model_of(use_lora_attention=True, rank=2)
    save_checkpoint(folder / "model.pth", {"model": model.state_dict(), "config": config.to_dict()})


def weights(folder: Path) -> None:
    model, config = model_of()
    save_weights(folder / "model.safetensors", model.state_dict(), config.to_dict())


def drop_in(folder: Path) -> None:
    model, config = model_of()
    save_drop_in(folder / "mine.safetensors", DropIn(model, [(0.25, "none")] * 5), config, "a recogniser")


def turntable(folder: Path) -> None:
    about = {"people": ["anna"], "pitches": [0], "yaws": [-30, 0, 30], "feature_dim": 6, "photo_size": 8}
    about |= {"picture_size": 8, "pixels_per_photo_pixel": 1.0}
    (folder / "metadata.json").write_text(json.dumps(about))
    np.save(folder / "features.npy", np.ones((1, 1, 3, 6), np.float16))
    np.save(folder / "keypoints.npy", np.random.default_rng(0).normal(size=(1, 1, 3, 5, 3)).astype(np.float32))
    Image.new("RGB", (24, 8)).save(folder / "anna.webp")


def picture_list(folder: Path) -> None:
    for i in range(20):
        (folder / f"{i}.jpg").write_bytes(b"picture")
    (folder / "pairs.txt").write_text("".join(f"{i}.jpg {int(i % 4 < 2)}\n" for i in range(20)))


def insightface_bin(folder: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (112, 112)).save(picture, "PNG")
    content = [picture.getvalue()] * 20, [i % 2 == 0 for i in range(10)]
    (folder / "set.bin").write_bytes(pickle.dumps(content))


def pair_file(folder: Path) -> None:
    picture_list(folder)
    write_pairs(folder / "pairs.csv", read_picture_pairs(folder / "pairs.txt", folder)[1])
    (folder / "pairs.txt").unlink()


def split_file(folder: Path) -> None:
    save_split(folder / "split.json", split_by_person(people(), val=2, test=2))


def cfp(folder: Path) -> None:
    """Twenty people in CFP's layout, two a fold; their pictures, which these readers do not open, are empty words."""
    protocol, lines = folder / "Protocol", {"F": [], "P": []}
    for kind, view, count in (("F", "frontal", 10), ("P", "profile", 4)):
        for person in range(1, 21):
            for number in range(1, count + 1):
                at = f"{person:03d}/{view}/{number:02d}"
                lines[kind].append(f"{len(lines[kind]) + 1} ../Data/Images/{at}.jpg\n")
                picture, points = (folder / "Data" / part / at for part in ("Images", "Fiducials"))
                for path in (picture, points):
                    path.parent.mkdir(parents=True, exist_ok=True)
                picture.with_suffix(".jpg").write_bytes(b"picture")
                points.with_suffix(".txt").write_text("".join(f"{i * 1.5},{i * i / 9}\n" for i in range(30)))
    for fold in range(10):
        part = protocol / f"Split/FP/{fold + 1:02d}"
        part.mkdir(parents=True)
        (part / "same.txt").write_text(f"{20 * fold + 1},{8 * fold + 1}\n")
        (part / "diff.txt").write_text(f"{20 * fold + 1},{8 * fold + 5}\n")
    for kind, listed in lines.items():
        (protocol / f"Pair_list_{kind}.txt").write_text("".join(listed))


def read_cfp(folder: Path) -> None:
    pictures = read_pictures(folder)
    read_landmarks(folder, pictures)
    read_protocol(folder, "FP", pictures)


def arrays(folder: Path) -> None:
    faces = people()
    for name, values in (("in", faces.src), ("poses", faces.angles.rad2deg()), ("points", faces.keypoints_3d)):
        np.save(folder / f"{name}.npy", values.numpy())
    checkpoint(TEMPORARY)


def read_arrays(folder: Path) -> None:
    options = PredictOptions(folder / "poses.npy", folder / "points.npy", drop_in=False, device="cpu")
    predict_file(str(TEMPORARY / "model.pth"), folder / "in.npy", TEMPORARY / "out.npy", options)


def store(folder: Path) -> None:
    _store(folder).get("a result", TrainConfig(**SMALL), lambda: {"test": {"all": {"rank1": 0.5}}, "names": ["a", "b"]})


def cells(folder: Path) -> None:
    rows = [dict.fromkeys((*COLUMNS, "base", "seed"), rank) | {"test_tar": 0.5, "error": ""} for rank in (4, 8)]
    pd.DataFrame([row | {"train_loss": json.dumps([5.0, 4.5])} for row in rows]).to_csv(
        folder / "cells.csv", index=False
    )


def _store(folder: Path) -> Store:
    made = object.__new__(Store)
    made.folder, made.made_by = folder, {}
    return made


LOADERS = {
    "face_set": Loader(face_set, load_face_views),
    "face_set_mmap": Loader(face_set, lambda folder: load_face_views(folder, mmap=True)),
    "split": Loader(split_file, lambda folder: load_split_file(folder / "split.json", people())),
    "checkpoint": Loader(checkpoint, lambda folder: load_model(folder / "model.pth")),
    "checkpoint_mmap": Loader(checkpoint, lambda folder: load_checkpoint(folder / "model.pth", mmap=True)),
    "weights": Loader(weights, lambda folder: load_model(folder / "model.safetensors")),
    "adapter": Loader(lambda folder: save_adapter(lora(), folder), lambda folder: load_adapter(lora(), folder)),
    "peft_adapter": Loader(
        lambda folder: save_peft_adapter(model_of(use_lora_attention=True, rank=2, pose_dim=0)[0], folder),
        lambda folder: load_peft_adapter(model_of(use_lora_attention=True, rank=2, pose_dim=0)[0], folder),
    ),
    "drop_in": Loader(drop_in, lambda folder: load_drop_in(folder / "mine.safetensors")),
    "store": Loader(store, lambda folder: _store(folder).find("a result", TrainConfig(**SMALL))),
    "cells": Loader(cells, lambda folder: read_cells(folder / "cells.csv")),
    "turntable": Loader(turntable, load_turntable),
    "pairs": Loader(pair_file, lambda folder: read_pairs(folder / "pairs.csv", 20)),
    "picture_pairs": Loader(picture_list, lambda folder: read_picture_pairs(folder / "pairs.txt", folder)),
    "insightface_bin": Loader(insightface_bin, lambda folder: read_insightface_bin(folder / "set.bin")),
    "cfp": Loader(cfp, read_cfp),
    "predict": Loader(arrays, read_arrays),
}


# ---- mutations: each takes the bytes of a file and a random generator


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 32))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def repeat(content: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:end] + content[start:]


def extreme(content: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    at, value = rng.randrange(max(1, len(content) - size)), rng.choice((0, 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1))
    return content[:at] + value.to_bytes(size, rng.choice(("little", "big"))) + content[at + size :]


def payload(content: bytes, rng: random.Random) -> bytes:
    return pickle.dumps(Run(), protocol=rng.choice((0, 2, 4)))


def of_json(content: bytes, rng: random.Random) -> bytes:
    """An odd value, a key taken away, named twice or nested deeply, somewhere in a JSON text."""
    if rng.random() < 0.05:
        return b"[" * rng.choice((100, 100_000))
    text = json.loads(content)
    node, places = text, []
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        places.append((node, key))
        node = node[key]
        if rng.random() < 0.3:
            break
    if not places:
        return json.dumps(rng.choice(ODD)).encode()
    inside, key = rng.choice(places)
    if rng.random() < 0.25:
        del inside[key]
    elif isinstance(inside, list) and rng.random() < 0.2:
        inside.append(inside[key])
    else:
        inside[key] = rng.choice(ODD)
    return json.dumps(text).encode()


def of_npy(content: bytes, rng: random.Random) -> bytes:
    """Another dtype, order or shape in the header, or odd numbers in the values."""
    array = np.load(io.BytesIO(content), allow_pickle=False)
    if rng.random() < 0.4:
        values = array.astype(np.float64)
        values.flat[rng.randrange(values.size)] = rng.choice((np.nan, np.inf, -np.inf, 0, 6e4, 1e-8))
        if rng.random() < 0.2:
            values[rng.randrange(len(values))] = 0
        made = io.BytesIO()
        with np.errstate(all="ignore"):
            np.save(made, values.astype(rng.choice((array.dtype, array.dtype, np.float64, np.int64, complex, bool))))
        return made.getvalue()
    kinds = ("<f4", ">f4", "<f2", "|O", "<i8", "<U9", "<f16", "<m8[s]", "V99999999", "(9,9)f4", [("a", "<f4")], "x", 3)
    lengths = [rng.choice((*array.shape, 0, 1, -1, 2**31, 2**62, 2**200)) for _ in range(rng.randrange(5))]
    header = {"descr": rng.choice(kinds), "fortran_order": rng.choice((False, True, None)), "shape": tuple(lengths)}
    text = repr(header).encode() + b" " * rng.choice((0, 40_000)) + b"\n"
    return b"\x93NUMPY\x01\x00" + (len(text) % 2**16).to_bytes(2, "little") + text + array.tobytes()


def of_zip(content: bytes, rng: random.Random) -> bytes:
    """An entry of an archive changed, renamed, compressed, left out, doubled, or a pickle that runs something."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        chosen = rng.choice(names) if rng.random() < 0.6 else next(name for name in names if name.endswith("data.pkl"))
        for name in names:
            inside, method = old.read(name), zipfile.ZIP_STORED
            if name == chosen:
                how = rng.choice(("flip", "extreme", "cut", "payload", "name", "compress", "leave", "double", "bomb"))
                if how in ("flip", "extreme", "cut", "payload"):
                    inside = {"flip": flip, "extreme": extreme, "cut": cut, "payload": payload}[how](inside, rng)
                elif how == "name":
                    name = rng.choice(("../../x", "/x", "x/", "", name + "/", "a" * 5000))
                elif how == "compress":
                    method = zipfile.ZIP_DEFLATED
                elif how == "bomb":
                    inside, method = bytes(2**26), zipfile.ZIP_DEFLATED
                elif how == "leave":
                    continue
                elif how == "double":
                    new.writestr(name, inside)
            new.writestr(name, inside, method)
    return made.getvalue()


def of_safetensors(content: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = of_json(content[8 : 8 + size], rng)
    if rng.random() < 0.5:  # the texts in it, which hold JSON of their own
        about = json.loads(content[8 : 8 + size])
        texts = about.get("__metadata__") or {}
        if key := next((key for key in rng.sample(list(texts), len(texts)) if texts[key][:1] in "{["), None):
            texts[key] = of_json(texts[key].encode(), rng).decode(errors="replace")
            header = json.dumps(about).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def of_lines(content: bytes, rng: random.Random) -> bytes:
    """A number, a name or a line of a text changed."""
    lines = content.decode(errors="replace").split("\n")
    at = rng.randrange(len(lines))
    words = lines[at].replace(",", " , ").split(" ")
    how = rng.randrange(4)
    if how == 0:
        words[rng.randrange(len(words))] = str(rng.choice(ODD))
        lines[at] = " ".join(words).replace(" , ", ",")
    elif how == 1:
        del lines[at]
    elif how == 2:
        lines.insert(at, rng.choice(lines))
    else:
        lines[at] = rng.choice(
            ("", "\0", "\ufeff" + lines[at], lines[at] * 1000, lines[at] + ",", "../" * 50 + "etc/passwd")
        )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


KNOWN = {".json": of_json, ".npy": of_npy, ".pth": of_zip, ".safetensors": of_safetensors, ".csv": of_lines}
KNOWN |= {".txt": of_lines}


def mutated(name: str, content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        known = KNOWN.get(Path(name).suffix)
        kinds = [flip, cut, repeat, extreme] + 6 * [known] * bool(known)
        mutate = payload if rng.random() < 0.02 else rng.choice(kinds)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zipfile's of a doubled name
                content = mutate(content, rng)
        except Exception:  # an earlier mutation left nothing that this one understands
            content = flip(content, rng)
    return content


# ---- the campaign


def check(loader: Loader, folder: Path) -> str | None:
    """What is wrong with how a loader takes the files of a folder; None if nothing is."""
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader.read(folder)
    except (ValueError, FileNotFoundError) as error:
        if str(folder) not in str(error):
            return f"does not name the file: {type(error).__name__}: {str(error)[:300]}"
        if len(str(error)) > 5000:
            return f"a message of {len(str(error))} letters"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
    finally:
        signal.alarm(0)
    if CANARY.exists():
        CANARY.unlink()
        return "ran what a pickle asked for"
    return None


def campaign(name: str, inputs: int, seed: int) -> int:
    """How many inputs failed."""
    loader, rng = LOADERS[name], random.Random(f"{name} {seed}")
    folder, failed, kept = TEMPORARY / name, 0, RUNS / "fuzz" / name
    folder.mkdir(parents=True)
    loader.make(folder)
    valid = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    parts: dict[str, list[Path]] = {}  # of a folder with many files of a kind, each kind is as likely
    for path, content in valid.items():
        if content != b"picture":
            parts.setdefault("/".join(path.relative_to(folder).parts[:2]), []).append(path)
    loader.read(folder)  # what is slow the first time, for torch loads more of itself
    if refused := check(loader, folder):
        raise RuntimeError(f"{name}: the valid files are refused: {refused}")
    started, told = time.monotonic(), set()
    for number in range(inputs):
        path = rng.choice(parts[rng.choice(list(parts))])
        path.write_bytes(mutated(path.name, valid[path], rng))
        if found := check(loader, folder):
            failed += 1
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, kept / f"{seed}_{number}_{path.name}")
            if (kind := found.replace(str(folder), "")[:60]) not in told:
                told.add(kind)
                print(f"  {name}, input {number}, {path.name}: {found}", flush=True)
        path.write_bytes(valid[path])
    left = {path for path in folder.rglob("*") if path.is_file()} - valid.keys()
    if left:
        print(f"  {name} left files: {sorted(left)}")
    print(f"{name:16s} {inputs:8d} inputs, {failed} failed, {time.monotonic() - started:.0f} s", flush=True)
    return failed


def stop(*_: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loaders", nargs="*", choices=[*LOADERS, []], metavar="LOADER", help=", ".join(LOADERS))
    parser.add_argument("--inputs", type=int, default=2000, help="for each loader")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, stop)
    held = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))
    TEMPORARY.mkdir()
    try:
        failed = sum(campaign(name, arguments.inputs, arguments.seed) for name in arguments.loaders or LOADERS)
    finally:
        shutil.rmtree(TEMPORARY)
    sys.exit(f"{failed} inputs failed; they are in {RUNS / 'fuzz'}" if failed else 0)


if __name__ == "__main__":
    main()
