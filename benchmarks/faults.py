"""What a power cut, a full disk or a flipped bit does to finished work.

    python benchmarks/faults.py [JOB ...] [--faults 200] [--seed 0]

A job (train, grid, predict; cfp, build, embed, which need the package's test-all) runs once undisturbed. Then, as often
as asked, in a folder of its own: it is killed (SIGKILL) at a random moment, or its files may grow no further than a
random size, or a random bit of what it left is flipped, or two run at once, or what was left gets random times; and it
is started again. A fault fails if the job then ends with another result, or with an error that does not name a file of
its folder, or if a limited one says anything but which file it could not write.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # optimisers would import it, in each attempt anew

from viewdiff_nb.faces.splits import Split
from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.files import PROJECT, fingerprint
from viewdiff_nb.predict import PredictOptions, predict_file
from viewdiff_nb.studies import adaptation
from viewdiff_nb.studies.ablation import Grid, run_grid
from viewdiff_nb.studies.store import Store
from viewdiff_nb.training import TrainConfig, train
from viewdiff_nb.training.checkpoint import build_model, load_model, newest_checkpoint, save_checkpoint

LONGEST = 120  # seconds of an attempt
CONFIG = TrainConfig(
    d_model=32, nhead=4, num_layers=2, dim_feedforward=32, voxel_resolution=4, batch_size=32, lr=1e-3, device="cpu"
)


def people(count: int, first: int, views: int = 8, width: int = 16) -> FaceViews:
    generator = torch.Generator().manual_seed(first)
    person = torch.arange(count).repeat_interleave(views)
    front = torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)
    angles = (torch.rand(len(person), 3, generator=generator) - 0.5) * torch.tensor([0.5, 3.0, 0.5])
    src = front[person] + 0.3 * angles[:, 1:2] * torch.randn(len(person), width, generator=generator)
    points = torch.randn(len(person), 5, 3, generator=generator)
    names = tuple(f"person_{first + i}" for i in range(count))
    return FaceViews(names, front, src, points, angles, person)


def digest(*parts: object) -> str:
    return fingerprint(*(p.numpy().tobytes() if isinstance(p, torch.Tensor) else str(p).encode() for p in parts))


# ---- the jobs: each does its work in a folder, going on with what it finds there, and returns a digest of the result


def run_train(folder: Path) -> str:
    config = replace(CONFIG, epochs=3, val_every=1, mixup=True, save_dir=str(folder / "run"), resume="auto")
    try:
        model = train(config, people(40, 0), people(20, 1000), progress=False).model
    except ValueError as error:
        if "epochs behind it" not in str(error):
            raise
        model = load_model(newest_checkpoint(folder / "run"))  # killed when all was done
    return digest(*model.state_dict().values())


def run_cells(folder: Path) -> str:
    split = Split(people(40, 0), people(20, 1000), people(20, 2000))
    profile = replace(adaptation.FAST_PROFILE, common=CONFIG, base_epochs=2, adapt_epochs=2)
    grid = Grid(rank=(2, 4), voxel_resolution=(4,), lambda_prior=(0.0, 0.1), base=(0,), seed=(0, 1))
    # one by one: a cell that is made again alone equals one of a pass to 1e-4, not bit for bit
    cells = run_grid(grid, split, profile, workers=1, cells_per_pass=1, store=Store(split, folder))
    if len(failed := cells[cells["error"] != ""]):  # a base that is damaged is named, and not made again
        raise ValueError(failed.iloc[0]["error"])
    kept = [name for name in cells if name.startswith(("test_", "val_", "rank", "lambda", "final", "error"))]
    return digest(cells[kept].to_csv(index=False))


def run_predict(folder: Path) -> str:
    given, out = folder.parent / "given", folder / "out.npy"
    options = PredictOptions(given / "poses.npy", drop_in=False, batch_size=512, device="cpu")
    predict_file(str(given / "model.pth"), given / "in.npy", out, options)
    return digest(torch.from_numpy(np.load(out)))


def run_cfp(folder: Path) -> str:
    from test_cfp import Averages

    from viewdiff_nb.faces import cfp

    cfp.make_recogniser = cfp._cached_recogniser = lambda name: Averages()  # type: ignore[assignment]
    cfp.embed_cfp(folder.parent / "given/cfp", folder / "set")
    return digest_of_files(folder / "set")


def run_build(folder: Path) -> str:
    from people import build as builder
    from test_build import Averages

    folder.mkdir(exist_ok=True)
    builder.build(folder / "set", builder.BuildConfig(people=6, views=4, seed=7, chunk=1), make_recogniser=Averages)
    return digest_of_files(folder / "set")


def run_embed(folder: Path) -> str:
    from viewdiff_nb.faces.embed import EmbedOptions, embed_folder

    given = folder.parent / "given"
    embed_folder(given / "photos", folder / "set", EmbedOptions(i_have_consent=True, models=given / "models"))
    return digest_of_files(folder / "set")


def digest_of_files(folder: Path) -> str:
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    return digest(*(f"{path.name} {fingerprint(path.read_bytes())}" for path in paths))


def write_given(folder: Path, jobs: list[str]) -> None:
    """What jobs read, which is nobody's finished work; and what they import, once for all attempts."""
    folder.mkdir()
    if set(jobs) & {"cfp", "build", "embed"}:
        sys.path[:0] = [str(PROJECT / part) for part in ("tests", "tests/people", "data")]
    if "cfp" in jobs:
        from test_cfp import write_stand_in

        write_stand_in(folder / "cfp")
    if "build" in jobs:
        from people import build as builder

        studio = builder.Studio()
        builder.Studio = lambda: studio  # which takes seconds to make
    if "embed" in jobs:
        import cv2
        from tiny_insightface import head, make_pack, take_photo

        make_pack(folder / "models")
        for number, name in enumerate(("anna", "bert")):
            (folder / "photos" / name).mkdir(parents=True)
            for yaw in (0, -40, 30):
                picture = take_photo(head(number), (0.0, float(yaw), 0.0)).picture
                cv2.imwrite(str(folder / f"photos/{name}/{yaw}.png"), picture)
    faces = people(4000, 0)
    np.save(folder / "in.npy", faces.src.numpy())
    np.save(folder / "poses.npy", faces.angles.rad2deg().numpy())
    torch.manual_seed(0)
    save_checkpoint(folder / "model.pth", {"model": build_model(CONFIG, 16).state_dict(), "config": CONFIG.to_dict()})
    load_model(folder / "model.pth")  # torch loads more of itself, once for all attempts


JOBS: dict[str, Callable[[Path], str]] = {"train": run_train, "grid": run_cells, "predict": run_predict}
JOBS |= {"cfp": run_cfp, "build": run_build, "embed": run_embed}


# ---- attempts, each in a process of its own


def attempt(job: str, folder: Path, seconds: float = LONGEST, limit: int | None = None) -> tuple[str, str]:
    """("done", digest), ("killed", ""), or ("error", class and message)."""
    return finish(*start(job, folder, limit), seconds)


def start(job: str, folder: Path, limit: int | None = None, number: int = 1) -> tuple[int, Path]:
    """The process of an attempt, perhaps one of several in the folder, and the file that will say how it ended."""
    said = folder.with_suffix(f".{number}.said")
    said.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
            warnings.simplefilter("ignore")
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            outcome = ["done", JOBS[job](folder)]
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = ["error", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.with_suffix(".part").write_text(json.dumps(outcome))
        os.replace(said.with_suffix(".part"), said)
        os._exit(0)
    return child, said


def finish(child: int, said: Path, seconds: float = LONGEST) -> tuple[str, str]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            if not said.is_file():
                return "error", "it ended without a word"
            return tuple(json.loads(said.read_text(encoding="utf-8")))
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed", ""


def flip_a_byte(folder: Path, rng: random.Random) -> Path | None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    if not files:
        return None
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return path


def campaign(job: str, faults: int, seed: int, root: Path) -> int:
    """How many faults failed."""
    rng, failed = random.Random(f"{job} {seed}"), 0
    started = time.monotonic()
    done, wanted = attempt(job, root / f"{job}_undisturbed")
    took = time.monotonic() - started
    if done != "done":
        raise RuntimeError(f"{job} fails undisturbed: {wanted}")
    again = attempt(job, root / f"{job}_undisturbed_2")
    if again != (done, wanted):
        raise RuntimeError(f"{job} is not the same twice: {wanted}, {again}")
    sizes = [path.stat().st_size for path in (root / f"{job}_undisturbed").rglob("*") if path.is_file()]
    kinds: dict[str, int] = {}
    for number in range(faults):
        folder, kind = (
            root / f"{job}_{number}",
            rng.choice(("killed", "killed", "no room", "flipped", "twice", "clock")),
        )
        what, problem = kind, ""
        if kind == "killed":
            for _ in range(rng.choice((1, 1, 2, 3))):
                attempt(job, folder, rng.uniform(0, took))
        elif kind == "no room":
            limit = rng.randrange(1, max(sizes))
            outcome, text = attempt(job, folder, limit=limit)
            if outcome == "error" and not (text.startswith("OSError") and str(folder) in text):
                problem = f"with files of {limit} bytes at most: {text[:300]}"
        elif kind == "twice":
            for ended, text in [finish(*one) for one in [start(job, folder, number=i) for i in (1, 2)]]:
                if (ended, text) != (done, wanted) and not (ended == "error" and str(folder) in text):
                    problem = f"two at once: {ended} {text[:300]}"
        elif kind == "clock":
            attempt(job, folder, rng.uniform(0.3, 1) * took)
            for path in folder.rglob("*"):
                os.utime(path, (rng.uniform(0, 2**32),) * 2)
        else:
            attempt(job, folder, rng.uniform(0.3, 1) * took if rng.random() < 0.5 else LONGEST)
            flipped = flip_a_byte(folder, rng) if folder.is_dir() else None
            what += f" ({flipped.name})" if flipped else " (nothing there)"
        outcome, text = attempt(job, folder)
        if outcome == "done" and text != wanted:
            problem = problem or "ends with another result"
        elif outcome != "done" and not (kind == "flipped" and str(folder) in text):
            problem = problem or f"then: {outcome} {text[:300]}"
        if problem:
            failed += 1
            print(f"  {job}, fault {number}, {what}: {problem}", flush=True)
        kinds[kind] = kinds.get(kind, 0) + 1
        shutil.rmtree(folder, ignore_errors=True)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(f"{job:8s} {faults} faults ({told}), {failed} failed, {time.monotonic() - started:.0f} s", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, []], metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--faults", type=int, default=200, help="for each job")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # of which a fork takes one along
    with tempfile.TemporaryDirectory(prefix="viewdiff_nb_faults_") as folder:
        jobs = arguments.jobs or list(JOBS)
        write_given(Path(folder) / "given", jobs)
        failed = sum(campaign(job, arguments.faults, arguments.seed, Path(folder)) for job in jobs)
    sys.exit(f"{failed} faults failed" if failed else 0)


if __name__ == "__main__":
    main()
