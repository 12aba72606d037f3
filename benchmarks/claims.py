"""Every number of README and docs against the CSV cell that it names:  python benchmarks/claims.py [--write]

A number is followed by a comment, which no reader of the page sees, with what it is:

    rank-1 .944 ± .008<!-- rates · small transformer · rank1 · all -->

The first word is a file of data/results/controls without its .csv, or a path of a CSV file in the project; then come
the cells that find the row, each in a column of its own; then, if it is not mean, the column. What is shown must be the
value, rounded to the digits that are shown; behind ± its half, behind "p" its p_holm. Tables stand between
<!-- table ... --> and <!-- end -->; they are made of

    <!-- table rates · rank1 all, tar 75-90 · MODEL · MODEL ... -->       a row a model, a column a rate and yaw
    <!-- table differences · FAMILY · rank1 all, tar all -->               a row a comparison
    <!-- table csv · FILE · COLUMN as HEAD; COLUMN ... -->   cells of a CSV file of finished cells, all its rows
    <!-- table grid · test_tar -->       rank by rule of alpha, at the learning rate that validation people choose
    <!-- table cells · GRID · rank · voxel_resolution · test_tar -->     an axis down, one across, the rest averaged
    <!-- table trials · tar all · MODEL · MODEL ... -->      the best trial of each learning rate, on validation people

and --write writes them anew. In the files of `STRICT` every number like .123 must stand in such a table or have such a
comment.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pandas as pd

from viewdiff_nb.files import CONTROL_RESULTS, PROJECT, write_text
from viewdiff_nb.studies.ablation import summary

STRICT = (
    "README.md",
    "README.zh-CN.md",
    *(f"docs/{page}.md" for page in ["modules", "ablation", "recipe", "training", "gpu"]),
)
NUMBER = r"[+−-]?\d*\.?\d+"
SHOWN = re.compile(rf"({NUMBER})(?: ± ({NUMBER}))?(?:, p (<?) ?({NUMBER}))?\**$")
MARK = re.compile(r"<!-- ([\w./-]+) · ([^>]*?) -->")  # no |, which would end a cell of a table
TABLE = re.compile(r"(<!-- table (\w+) · ([^>]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
RATE = re.compile(r"(?<![\w.\d])[+−-]?\.\d{2,3}(?!\d)")
Table = tuple[list[str], list[list[str]]]  # heads, and rows of cells
KEYS = {  # by which columns a row is found
    "rates": ["model", "rate", "yaw"],
    "differences": ["family", "model", "other", "rate", "yaw"],
    "geometry": ["model", "measure"],
    "robust": ["model", "measure", "rate"],
    "growth": ["model", "people", "views", "rate"],
    "curves": ["model", "epochs", "rate"],
    "cfp_differences": ["model", "other", "rate"],
    "any_pose": ["trained for", "measure"],
    "any_pose_differences": ["model", "other", "measure"],
    "models": ["model"],
    "several.csv": ["batch_size", "name", "mode"],
    "second_renderer": ["renderer", "model", "rate", "yaw"],
}


@cache
def read(name: str) -> pd.DataFrame:
    path = PROJECT / name if name.endswith(".csv") else CONTROL_RESULTS / f"{name}.csv"
    return pd.read_csv(path, dtype={"rate": str, "yaw": str})


def find(name: str, cells: list[str]) -> tuple[pd.Series, str]:
    """The row that the cells name, and the column that is meant.

    Raises LookupError if there is none, or more than one.
    """
    table = read(name)
    keys = KEYS.get(Path(name).name, [str(table.columns[0])])
    if len(cells) < len(keys):
        raise LookupError(f"{name} wants {', '.join(keys)}, got {cells}")
    rows = table
    for key, cell in zip(keys, cells, strict=False):
        rows = rows[rows[key].astype(str) == cell]
    column = cells[len(keys)] if len(cells) > len(keys) else "mean"
    if len(rows) != 1 or column not in rows:
        raise LookupError(f"{len(rows)} rows of {name} are {cells}, or it has no column {column}")
    return rows.iloc[0], column


def differs(shown: str, value: float) -> bool:
    """Whether the value, rounded as the text is, is another one."""
    text = shown.replace("−", "-")
    return abs(float(text) - value) > 0.5000001 * 10 ** -len(text.partition(".")[2])


def wrong_numbers(text: str) -> Iterator[str]:
    """What is wrong with the marked numbers of a page."""
    for mark in MARK.finditer(text):
        line = text.count("\n", 0, mark.start()) + 1
        name, cells = mark[1], [cell.strip() for cell in mark[2].split(" · ")]
        shown = SHOWN.search(text[max(0, mark.start() - 60) : mark.start()])
        if not shown:
            yield f"line {line}: no number before {mark[0]}"
            continue
        try:
            row, column = find(name, cells)
        except (LookupError, FileNotFoundError) as error:
            yield f"line {line}: {error}"
            continue
        number, half, below, p = shown.groups()
        if isinstance(row[column], str):  # a CSV file of finished cells, as "95.2 ± 0.7"
            if re.sub(r"\b0\.", ".", row[column]) != re.sub(r"\b0\.", ".", shown[0].rstrip("*")):
                yield f"line {line}: {shown[0]} is {row[column]} in {name}"
            continue
        if differs(number, float(row[column])):
            yield f"line {line}: {number} is {row[column]:.5f} in {name}, {cells}"
        if half and differs(half, float(row["half"])):
            yield f"line {line}: ± {half} is {row['half']:.5f} in {name}, {cells}"
        if p and (float(row["p_holm"]) >= float(p) if below else differs(p, float(row["p_holm"]))):
            yield f"line {line}: p {p} is {row['p_holm']:.5f} in {name}, {cells}"


def unmarked(text: str) -> Iterator[str]:
    """Numbers like .123 that no comment and no table vouches for."""
    rest = re.sub(r"```.*?```", lambda code: "\n" * code[0].count("\n"), text, flags=re.DOTALL)
    rest = TABLE.sub(lambda table: "\n" * table[0].count("\n"), rest)
    for number, line in enumerate(rest.splitlines(), 1):
        plain = MARK.sub("\x00", line)
        plain = re.sub(rf"{NUMBER}(?: ± {NUMBER})?(?:, p <? ?{NUMBER})?\**\x00", "", plain)
        for found in RATE.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", "", plain)):
            yield f"line {number}: {found} names no cell"


def p_words(p: float) -> str:
    return "p < .001" if p < 0.001 else f"p {p:.3f}".replace("0.", ".")


def short(value: float, sign: str = "") -> str:
    """.944, +.016, −.008; 1.000 and 0.000 keep their first digit."""
    return re.sub(r"^([+-]?)0\.(?!0+$)", r"\1.", f"{value:{sign}.3f}").replace("-", "−")


def table_of(name: str, told: str) -> str:
    """The Markdown of a table."""
    if name not in KINDS:
        raise LookupError(f"there is no table {name}, only {', '.join(KINDS)}")
    heads, rows = KINDS[name]([part.strip() for part in told.split(" · ")])
    lines = [heads, ["---"] * len(heads), *rows]
    separated = ("|" + "|".join(line) + "|" if line[0] == "---" else "| " + " | ".join(line) + " |" for line in lines)
    return "\n".join(separated).replace("|  |", "| |") + "\n"


def rates_and_yaws(told: str) -> list[list[str]]:
    """[[rate, yaw], ...] of "rank1 all, tar 75-90"."""
    return [head.strip().split(" ", 1) for head in told.split(",")]


def rates_table(parts: list[str]) -> Table:
    asked, budget = rates_and_yaws(parts[0]), read("models").set_index("model")
    rows = []
    for model in parts[1:]:
        found = [find("rates", [model, *head])[0] for head in asked]
        count = int(budget.loc[model, "trained parameters"])
        size = f"{count / 1e6:.2f} M" if count >= 10_000 else "–"
        rows.append([model, size, *(f"{short(row['mean'])} ± {short(row['half'])}" for row in found)])
    return ["model", "parameters trained", *(", ".join(head) for head in asked)], rows


def differences_table(parts: list[str]) -> Table:
    family, asked, table = parts[0], rates_and_yaws(parts[1]), read("differences")
    table = table[table["family"] == family]
    rows = []
    for model, other in dict.fromkeys(zip(table["model"], table["other"], strict=True)):
        cells = []
        for head in asked:
            row, _ = find("differences", [family, model, other, *head])
            cell = f"{short(row['mean'], '+')} ± {short(row['half'])}, {p_words(row['p_holm'])}"
            cells.append(f"**{cell}**" if row["p_holm"] < 0.05 else cell)
        rows.append([model, other, *cells])
    return ["model", "against", *(", ".join(head) for head in asked)], rows


def trials_table(parts: list[str]) -> Table:
    rate, models, trials = parts[0], parts[1:], read("trials")
    best = trials[trials["model"].isin(models)].pivot_table(rate, "model", "lr", aggfunc="max").loc[models]
    rows = [
        [str(model), *(f"**{short(v)}**" if v == row.max() else short(v) for v in row)]
        for model, row in best.iterrows()
    ]
    return ["model", *(f"{lr:g}" for lr in best)], rows


def csv_table(parts: list[str]) -> Table:
    table = pd.read_csv(PROJECT / parts[0], dtype=str)
    columns = [column.strip().split(" as ") for column in parts[1].split(";")]
    rows = [[row.iloc[0], *(row[column[0]] for column in columns)] for _, row in table.iterrows()]
    return ["", *(column[-1] for column in columns)], rows


def grid_table(parts: list[str]) -> Table:
    keys = ["rank", "alpha"]
    cells = read("ablation_rates")
    mean = cells.groupby([*keys, "lora_lr"])[["val_tar", parts[0], "final_train_loss"]].mean()
    half = summary(cells, [*keys, "lora_lr"], parts[0])["half"]
    best = mean.loc[mean.groupby(level=keys)["val_tar"].idxmax()].reset_index("lora_lr")
    rules = list(dict.fromkeys(best.index.get_level_values("alpha")))
    rows = []
    for rank, lowest in mean["final_train_loss"].groupby("rank").min().items():
        of_rules = [best.loc[(rank, rule)] for rule in rules]
        halves = [half[rank, rule, row["lora_lr"]] for rule, row in zip(rules, of_rules, strict=True)]
        shown = [
            f"{short(r[parts[0]])} ± {short(h)} at {r['lora_lr']:g}" for r, h in zip(of_rules, halves, strict=True)
        ]
        rows.append([str(rank), *shown, f"{lowest:.2f}"])
    return ["rank", *(f"alpha {rule}" for rule in rules), "lowest training loss"], rows


def cells_table(parts: list[str]) -> Table:
    name, down, across, value = parts
    found = summary(read(f"ablation_{name}"), [down, across], value)
    rows = [
        [f"{row:g}", *(f"{short(e['mean'])} ± {short(e['half'])}" for _, e in found.loc[row].iterrows())]
        for row in found.index.unique(0)
    ]
    return [f"{down} \\ {across}", *(f"{column:g}" for column in found.index.unique(1))], rows


KINDS: dict[str, Callable[[list[str]], Table]] = {
    "rates": rates_table,
    "differences": differences_table,
    "trials": trials_table,
    "csv": csv_table,
    "grid": grid_table,
    "cells": cells_table,
}


def wrong_tables(text: str) -> Iterator[str]:
    for table in TABLE.finditer(text):
        if table[4] != table_of(table[2], table[3]):
            yield f"the table {table[2]} · {table[3][:50]} is not that of the CSV file; run with --write"


def problems(path: Path, strict: bool) -> list[str]:
    """What is wrong with a page."""
    text = path.read_text(encoding="utf-8")
    return [*wrong_tables(text), *wrong_numbers(text), *(unmarked(text) if strict else ())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables anew")
    arguments = parser.parse_args()
    found = []
    for path in [*sorted(PROJECT.glob("*.md")), *sorted((PROJECT / "docs").glob("*.md"))]:
        name = path.relative_to(PROJECT).as_posix()
        if arguments.write:
            text = path.read_text(encoding="utf-8")
            if (new := TABLE.sub(lambda t: t[1] + table_of(t[2], t[3]) + t[5], text)) != text:
                write_text(path, new)
        found += [f"{name}, {problem}" for problem in problems(path, name in STRICT)]
    if found:
        sys.exit("\n".join(found))
    print("every number is that of its cell")


if __name__ == "__main__":
    main()
