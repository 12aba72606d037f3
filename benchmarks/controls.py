"""Every model with the same budget, beside the controls that could refute what is said of it.

    python benchmarks/controls.py [OUT] [--effort full|shipped|small|fast] [--parts trials finals curves growth]
                                  [--rows NAME ...] [--seeds 5] [--workers N]

About 1,900 trainings: half an hour on four GPUs, days on two CPU cores. There --effort fast does two trials and one
seed with few people, shipped takes the settings that were chosen on a GPU (with --rows, of some models), and small does
so with a transformer of two layers, 256 wide. Finished trainings are kept under runs/ (VIEWDIFF_NB_RUNS); started
again, it goes on where it was. OUT, by default data/results/controls or for others runs/EFFORT/controls, gets
    models.csv       every row's budget: parameters trained, samples seen, trials, seeds; and the chosen settings
    trials.csv       every trial of every row, its rates on validation people
    rates.csv        what was chosen, with other seeds, on test people: mean, half of the 95 % interval
    differences.csv  the comparisons that a claim needs, paired by seed and person; p after Holm within a family
    curves.csv       validation rates by epochs
    growth.csv       test rates by training people and views a person
    robust.csv       test rates by errors of pose and keypoints, and by size of the gallery
    geometry.csv     where the projections' density lies
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from viewdiff_nb.files import CONTROL_RESULTS, RUNS
from viewdiff_nb.studies import adaptation, controls, tables
from viewdiff_nb.studies.benchmark import machine
from viewdiff_nb.studies.candidates import CLOSED_FORMS
from viewdiff_nb.studies.control_rows import ROWS, VIEW_COUNTS, rows_of
from viewdiff_nb.studies.significance import holm, over_seeds
from viewdiff_nb.studies.store import run_jobs

TRIED = ("scratch", "adapted", "recipe", "views")
FIXED = ("raw side view", "mean face", *CLOSED_FORMS)
GUIDE_SEEDS = (1, 2)
CURVES = ("MLP, 1024 wide", "small transformer", "transformer", "full fine-tuning", "LoRA r=8", "projection")
CURVE_EPOCHS = (1, 2, 4, 8, 16, 32)
GROWING = ("MLP, 1024 wide", "small transformer", "full fine-tuning", "LoRA r=8", "LoRA r=8 + projection")
PEOPLE, VIEWS = (160, 325, 650, 1300), (2, 4, 8, 16)
RATES, SIDES = ("rank1", "tar", "cosine", "mse"), ("all", "0-45", "45-90", "0-30", "30-45", "45-60", "60-75", "75-90")
LORA, FULL, BOTH = "LoRA r=8", "full fine-tuning", "LoRA r=8 + projection"
MISLED = [name for name in ROWS if name.startswith("projection,")]
COMPARISONS: dict[str, list[tuple[str, str]]] = {
    "from scratch": [
        ("small transformer", "canonical correlation"),
        *(("small transformer", f"MLP, {width} wide") for width in (256, 1024, 2048)),
        ("small transformer", "DREAM"),
        ("small transformer", "transformer"),
        ("small transformer + projection", "small transformer"),
        ("transformer + projection", "transformer"),
    ],
    "modules": [
        *((name, "base") for name in (FULL, LORA, "projection", BOTH)),
        (LORA, FULL),
        (BOTH, FULL),
        (BOTH, LORA),
        (BOTH, "LoRA r=19"),
        (BOTH, "LoRA r=8 on both"),
        (BOTH, "LoRA r=8 + plain layer"),
        (LORA, "LoRA r=8 without pose"),
        ("LoRA r=16", LORA),
        ("LoRA r=8", "LoRA r=4"),
        ("transformer", FULL),
    ],
    "3-D": [*(("projection", name) for name in MISLED), ("projection", "plain layer"), (f"{BOTH} 16³", BOTH)],
    "cross-view": [
        pair
        for v in VIEW_COUNTS
        for pair in (
            (f"cross-view, {v} views", f"average, {v} views"),
            (f"cross-view, {v} views that do not meet", f"average, {v} views"),
            (f"cross-view, {v} views", f"cross-view, {v} views that do not meet"),
        )
    ],
    "prior": [
        (FULL, "base"),
        (LORA, "base"),
        *((f"{name} + prior {w:g}", name) for name in (FULL, LORA) for w in (0.1, 1, 10)),
        *((f"{FULL} + prior 1, {term} only", f"{FULL} + prior 1") for term in ("kl", "feature", "l2")),
        *((f"{FULL} + prior {w:g}", LORA) for w in (0.1, 1, 10)),
    ],
    "ways to adapt": [
        (name, LORA)
        for name in ROWS
        if name in ("last layer only", "LoRA r=8 on feed-forward", "LoRA r=8 on both", "rsLoRA r=16")
        or name.startswith(("biases", "bottleneck", "DoRA"))
    ],
    "recipe": [(name, "small transformer") for name in rows_of("recipe")],
    "guide's recipe": [
        ("guide: LoRA r=8", "guide: full fine-tuning"),
        ("guide: LoRA r=8 + projection 16³", "guide: full fine-tuning"),
        ("guide: full fine-tuning", FULL),
        ("guide: LoRA r=8", LORA),
        ("guide: LoRA r=8 + projection 16³", f"{BOTH} 16³"),
    ],
}


def work(effort: str, what: str, *of: object) -> str | None:
    """One job, whose result goes to the store; what went wrong, if anything did."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        if what == "base":
            chosen, split, store = controls.setting(effort)
            adaptation.base_model(store, split, chosen.profile, *of)  # type: ignore[arg-type]
        elif what == "fixed":
            _, split, store = controls.setting(effort)
            adaptation.run_job(store, split, controls.EFFORTS[effort].profile, str(of[0]), 0)
        else:
            getattr(controls, what)(effort, *of)
    except Exception as error:
        return f"{what} {of}: {type(error).__name__}: {error}"
    print(f"{what} {of} in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return None


def do(effort: str, jobs: Iterable[tuple], workers: int | None, failed: list[str]) -> None:
    """Jobs side by side; what failed is named, and the others go on."""
    started, jobs = time.perf_counter(), list(jobs)
    failed += [found for found in run_jobs(partial(work, effort), jobs, workers) if found]
    print(f"{len(jobs)} jobs in {time.perf_counter() - started:.0f} s; {len(failed)} failed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--parts", nargs="+", default=["trials", "finals", "curves", "growth"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="of these models only")
    parser.add_argument("--effort", default="full", choices=controls.EFFORTS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    effort: str = arguments.effort
    out = arguments.out or (CONTROL_RESULTS if effort == "full" else RUNS / effort / "controls")
    out.mkdir(parents=True, exist_ok=True)
    chosen = controls.EFFORTS[effort]
    failed: list[str] = []
    seeds, rows = chosen.seeds[: arguments.seeds], [name for name in ROWS if name in arguments.rows]
    single = [name for name in rows if ROWS[name].group not in ("views", "guide")]
    views = [name for name in rows if ROWS[name].group == "views"]
    averages = [f"average, {v} views" for v in VIEW_COUNTS] if views else []
    run = partial(do, effort, workers=arguments.workers, failed=failed)

    run([("base", seed) for seed in (0, *seeds)] + [("fixed", name) for name in FIXED])
    if "trials" in arguments.parts:
        long_first = sorted(single, key=lambda name: ("16³" not in name, ROWS[name].group != "scratch"))
        trials = range(len(chosen.trials))
        run([("try_out", name, trial) for name in long_first for trial in trials])
        if views:
            run([("single_view", seed) for seed in (0, *seeds)])
        run([("try_out", name, trial) for name in views for trial in trials])
    if "finals" in arguments.parts:
        guide = [name for name in rows if ROWS[name].group == "guide"]
        jobs = [("final", name, seed) for name in reversed(guide) for seed in GUIDE_SEEDS if seed in seeds]
        run(jobs + [("final", name, seed) for seed in seeds for name in (*single, *views, *averages)])
    if "curves" in arguments.parts:
        long_first = sorted(CURVE_EPOCHS if effort != "fast" else CURVE_EPOCHS[:2], reverse=True)
        run([("curve", name, e, seed) for e in long_first for name in CURVES if name in rows for seed in seeds[:3]])
    if "growth" in arguments.parts:
        sizes = [(people, 16) for people in PEOPLE] + [(1300, views) for views in VIEWS[:-1]]
        sizes = [(160, 16), (160, 4)] if effort == "fast" else sizes
        run([("fewer", name, *size, seed) for size in sizes for name in GROWING if name in rows for seed in seeds[:3]])
    Tables(effort, out, seeds).write()
    if failed:
        sys.exit(f"{len(failed)} jobs failed:\n" + "\n".join(failed))


class Tables:
    """CSV files of what is in the store."""

    def __init__(self, effort: str, out: Path, seeds: Sequence[int]) -> None:
        self.effort, self.out, self.seeds = effort, out, seeds
        self.chosen, self.split, self.store = controls.setting(effort)
        self.note = f"{machine()}; python benchmarks/controls.py --effort {effort}"

    def write(self) -> None:
        parts = {"trials": self.trials, "curves": self.curves, "growth": self.growth}
        results = self.results()
        parts |= {
            "models": partial(self.models, results),
            "rates": partial(self.rates, results),
            "differences": partial(self.differences, results),
            "robust": partial(self.extras, results, "robust"),
            "geometry": partial(self.extras, results, "geometry"),
        }
        for name, table in parts.items():
            if rows := table():
                frame = pd.DataFrame(rows)
                frame.to_csv(self.out / f"{name}.csv", index=False, float_format="%.5f")
                print(f"{name}: {len(frame)} rows", flush=True)
        (self.out / "made_by.txt").write_text(f"{self.note}\n", encoding="utf-8")

    def stored(self, what: Callable, *of: object) -> dict | None:
        """A result that is there; nothing is trained here."""
        try:
            return self._only_stored(what, *of)
        except LookupError:
            return None

    def _only_stored(self, what: Callable, *of: object) -> dict:
        get = self.store.get

        def find(name: str, config: object, make: object, with_weights: bool = False) -> dict:
            if (found := self.store.find(name, config, with_weights)) is None:  # type: ignore[arg-type]
                raise LookupError(name)
            return found

        self.store.get = find  # type: ignore[method-assign, assignment]
        try:
            return what(self.effort, *of)
        finally:
            self.store.get = get  # type: ignore[method-assign]

    def results(self) -> tables.Results:
        job = partial(adaptation.run_job, self.store, self.split, self.chosen.profile)
        found = {(name, self.seeds[0]): job(name, 0) for name in FIXED}
        found |= {("base", seed): job("base", seed) for seed in self.seeds}
        for name in (*ROWS, *(f"average, {v} views" for v in VIEW_COUNTS)):
            for seed in self.seeds:
                if result := self.stored(controls.final, name, seed):
                    found[name, seed] = result
        return found

    def trials(self) -> list[dict]:
        rows = []
        for name in ROWS:
            for trial in range(len(self.chosen.trials)):
                if found := self.stored(controls.try_out, name, trial):
                    val = {f"{rate} {side}": of[rate] for side, of in found["val"].items() for rate in ("rank1", "tar")}
                    rows.append({"model": name} | found["settings"] | val | {"seconds": found["train_seconds"]})
        return rows

    def models(self, results: tables.Results) -> list[dict]:
        rows = []
        for name, found in tables.by_name(results).items():
            group = ROWS[name].group if name in ROWS else "average" if "views" in name else "fixed"
            settings = found[0].get("settings", found[0].get("setting", {}))
            about = {"model": name, "group": group, "trained parameters": found[0].get("trainable", 0)}
            about |= {"samples seen": self.samples(name, group), "seeds": len(found)}
            about["trials"] = len(self.chosen.trials) if group in TRIED else 18 if name in CLOSED_FORMS else 0
            rows.append(about | {"settings": json.dumps(settings)})
        return rows

    def samples(self, name: str, group: str) -> int:
        """How many views a model of a table saw in its training, its base's among them."""
        train, chosen = self.split.train, self.chosen
        side = int((train.abs_yaw >= adaptation.BOUNDARY).sum())
        base, all_views = chosen.profile.base_epochs * (len(train) - side), len(train)
        adapted = {"adapted": side * chosen.adapt_epochs, "guide": side * chosen.guide_epochs}
        single = base + all_views * chosen.adapt_epochs
        of_group = {name: base + count for name, count in adapted.items()}
        of_group |= {"views": single + all_views * chosen.view_epochs, "average": single}
        of_group |= dict.fromkeys(("scratch", "recipe"), all_views * chosen.scratch_epochs)
        return of_group.get(group, base if name == "base" else 0)

    def rates(self, results: tables.Results) -> list[dict]:
        rows = []
        for name, found in tables.by_name(results).items():
            for rate in RATES:
                for side in SIDES if "0-30" in found[0]["test"] else ("all",):
                    e = tables.rate_estimate(results, name, rate, side)
                    rows.append({"model": name, "rate": rate, "yaw": side, "mean": e.mean, "half": e.bound})
        return rows

    def differences(self, results: tables.Results) -> list[dict]:
        there = {name for name, _ in results}
        rows: list[dict] = []
        for family, pairs in COMPARISONS.items():
            of_family: list[dict] = []
            for name, other in pairs:
                if not {name, other} <= there:
                    continue
                seeds = {s for n, s in results if n == name} & {s for n, s in results if n == other}
                few = {k: v for k, v in results.items() if k[0] not in (name, other) or k[1] in seeds}
                few |= {k: v for k, v in results.items() if k[0] in FIXED}
                sides = ("all",) if family == "cross-view" else ("all", "0-45", "45-90")
                for rate in ("rank1", "tar"):
                    for side in sides:
                        e = tables.difference(few, name, other, rate, side)
                        about = {"family": family, "model": name, "other": other, "rate": rate, "yaw": side}
                        of_family.append(about | {"mean": e.mean, "half": e.half, "seeds": e.seeds, "p": e.p})
            for row, p in zip(of_family, holm([row["p"] for row in of_family]), strict=True):
                rows.append(row | {"p_holm": p, "of": len(of_family)})
        return rows

    def curves(self) -> list[dict]:
        rows = []
        for name in CURVES:
            for epochs in CURVE_EPOCHS:
                found = [r for s in self.seeds[:3] if (r := self.stored(controls.curve, name, epochs, s))]
                for rate in ("rank1", "tar") if found else ():
                    e = over_seeds(r["val"]["all"][rate] for r in found)
                    rows.append({"model": name, "epochs": epochs, "rate": rate, "mean": e.mean, "half": e.half})
        return rows

    def growth(self) -> list[dict]:
        rows = []
        sizes = [(people, 16) for people in PEOPLE] + [(PEOPLE[-1], views) for views in VIEWS[:-1]] + [(160, 4)]
        for name in GROWING:
            for people, views in sizes:
                found = [r for s in self.seeds[:3] if (r := self.stored(controls.fewer, name, people, views, s))]
                for rate in ("rank1", "tar") if found else ():
                    e = over_seeds(r["test"]["all"][rate] for r in found)
                    about = {"model": name, "people": people, "views": views, "rate": rate}
                    rows.append(about | {"mean": e.mean, "half": e.half, "seeds": len(found)})
        return rows

    def extras(self, results: tables.Results, what: str) -> list[dict]:
        rows = []
        for name, found in tables.by_name(results).items():
            if what not in found[0]:
                continue
            for measure, value in found[0][what].items():
                of = {"": value} if isinstance(value, float) else value
                for rate in of:
                    values = [r[what][measure][rate] if rate else r[what][measure] for r in found]
                    e = over_seeds(values)
                    about = {"model": name, "measure": measure, "rate": rate}
                    rows.append(about | {"mean": e.mean, "half": e.half, "seeds": len(found)})
        return rows


if __name__ == "__main__":
    main()
