"""The project's pages as a static site:  python docs/site/build.py [OUT]   (make docs)

Writes OUT/site, by default build/site: README and docs, the notebooks as they were executed, the API from its
docstrings, a search, and live/, where the shipped weights run in the browser. Nothing is loaded from elsewhere:

    python -m http.server -d build/site

Two packages for browsers come from npm, once; they are kept in ~/.cache/viewdiff_nb and compared with their sums.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

from viewdiff_nb.drop_in import DropIn
from viewdiff_nb.export import export_onnx
from viewdiff_nb.faces import load_face_views, split_by_person
from viewdiff_nb.faces.geometry import YAW_BINS
from viewdiff_nb.faces.recogniser import fetch_from_npm
from viewdiff_nb.faces.turntable import load_turntable
from viewdiff_nb.files import HEADS, PROJECT
from viewdiff_nb.pretrained import load_pretrained

HERE = Path(__file__).resolve().parent
ORT, MATHJAX = "onnxruntime-web@1.22.0", "mathjax@3.2.2"
FETCHED = {  # a file of a package: the folder it goes to
    (ORT, "dist/ort.wasm.min.mjs"): "live",
    (ORT, "dist/ort-wasm-simd-threaded.mjs"): "live",
    (ORT, "dist/ort-wasm-simd-threaded.wasm"): "live",
    (MATHJAX, "es5/tex-svg.js"): "assets",
}
SHA256 = {
    "dist/ort.wasm.min.mjs": "6ef726f355b791129f7ddf3f62e7877a16b9b777abe87004b8ab306e6b9cf265",
    "dist/ort-wasm-simd-threaded.mjs": "30dd851d9c00622940500f71ddd2ff8820c5cb65270816080175b958705385a8",
    "dist/ort-wasm-simd-threaded.wasm": "71aef04959c5c1b6de461b6538e2058e306610034a85aad2742d0c7fd4533fe4",
    "es5/tex-svg.js": "d4295dc33744836935c1399feece5159577b34c5c8ffb9f1c6324cd82e03a882",
}
SHOWN = ("*.md", "docs/*.md", "notebooks/*.ipynb", "figures/*.*", "viewdiff_nb/weights/README.md")
SHOWN += ("data/*/README.md", "data/results/**/*.*", "CITATION.cff", "LICENSE", "environment.yml")


def stage(pages: Path) -> None:
    """Copy what is shown to where MkDocs reads; a link to a folder becomes one to its README."""
    shutil.rmtree(pages, ignore_errors=True)
    for path in sorted({path for pattern in SHOWN for path in PROJECT.glob(pattern) if path.is_file()}):
        target = pages / path.relative_to(PROJECT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            text = path.read_text(encoding="utf-8")
            target.write_text(with_links_to_readmes(text, path.parent), encoding="utf-8")
        elif path.suffix == ".ipynb":
            target.write_text(with_links_to_pages(path.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            shutil.copyfile(path, target)
    shutil.copytree(HERE / "live", pages / "live")
    shutil.copytree(HERE / "assets", pages / "assets")
    for (package, file), folder in FETCHED.items():
        shutil.copy(fetch_from_npm(package, file, SHA256[file]), pages / folder)


def with_links_to_readmes(text: str, folder: Path) -> str:
    """The text of a page in folder, whose links to folders lead to their README instead."""

    def readme(link: re.Match) -> str:
        return f"]({link[1].rstrip('/')}/README.md)" if (folder / link[1] / "README.md").is_file() else link[0]

    return re.sub(r"\]\(([^):#]+)\)", readme, text)


def with_links_to_pages(notebook: str) -> str:
    """A notebook whose links lead to pages; in Markdown files MkDocs sees to it, in notebooks nobody does."""
    content = json.loads(notebook)
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"\]\(([^):#]*?)README\.md", r"](\1index.html", "".join(cell["source"]))
            cell["source"] = re.sub(r"\]\(([^):#]+)\.(?:md|ipynb)", r"](\1.html", text)
    return json.dumps(content)


def stage_api(pages: Path) -> list[dict[str, str]]:
    """A page a room of the package, and what the navigation shows of them."""
    package, rooms = PROJECT / "viewdiff_nb", {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if path.read_text(encoding="utf-8").strip():
            name = ".".join(("viewdiff_nb", *(part for part in parts if part != "__init__")))
            rooms.setdefault(parts[0] if len(parts) > 1 else "viewdiff_nb", []).append(name)
    (pages / "api").mkdir()
    for room, names in rooms.items():
        text = "\n\n".join([f"# {room}", *(f"::: {name}" for name in sorted(names))])
        (pages / "api" / f"{room}.md").write_text(f"{text}\n", encoding="utf-8")
    return [{room: f"api/{room}.md"} for room in rooms]


def write_live_data(folder: Path) -> None:
    """What live.js reads: people.json; network.onnx, the shipped network's whole answer; and little-endian arrays,
    features.f16 (P, pitches, yaws, D), keypoints.f32 (P, pitches, yaws, 5, 3) and fronts.f16 (G, D)."""
    table, gallery = load_turntable(), split_by_person(load_face_views(HEADS), val=200, test=300).test
    weights = load_pretrained("mobilefacenet")
    assert weights.model is not None
    if any(centring != "none" for _, centring in weights.ways):
        raise ValueError(f"the page knows steps and no centring, the weights have {weights.ways}")
    whole = DropIn(weights.model, [(1.0, "none")] * len(YAW_BINS)).eval()
    export_onnx(whole, folder / "network.onnx")
    onnx.save(halved(onnx.load(folder / "network.onnx")), folder / "network.onnx")
    table.features.numpy().astype("<f2").tofile(folder / "features.f16")
    table.keypoints.numpy().astype("<f4").tofile(folder / "keypoints.f32")
    gallery.front.numpy().astype("<f2").tofile(folder / "fronts.f16")
    about = {
        "names": table.names,
        "own": [gallery.names.index(name) for name in table.names],
        "yaws": table.yaws,
        "pitches": table.pitches,
        "width": gallery.feature_dim,
        "picture_size": table.picture_size,
        "bins": [low for low, _ in YAW_BINS],
        "steps": [step for step, _ in weights.ways],
    }
    (folder / "people.json").write_text(json.dumps(about), encoding="utf-8")
    for name in table.names:
        shutil.copy(table.folder / f"{name}.webp", folder)


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with those weights in half precision that are the same in it: the shipped ones are."""
    casts, graph = [], model.graph
    for weight in graph.initializer:
        value = numpy_helper.to_array(weight)
        if value.dtype == np.float32 and value.size > 256 and np.array_equal(value.astype(np.float16), value):
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(value.astype(np.float16), f"{name}.half"))
            casts.append(helper.make_node("Cast", [weight.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=PROJECT / "build", help="where pages and site are made")
    out = parser.parse_args().out.resolve()
    pages, site = out / "pages", out / "site"
    stage(pages)
    config = yaml.safe_load((HERE / "mkdocs.yml").read_text(encoding="utf-8"))
    next(entry for entry in config["nav"] if "API" in entry)["API"] = stage_api(pages)
    write_live_data(pages / "live")
    (out / "mkdocs.yml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", out / "mkdocs.yml"]
    subprocess.run(command, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(PROJECT)})
    size = sum(path.stat().st_size for path in (site / "live").iterdir()) / 1e6
    print(f"{site}: {len(list(site.rglob('*.html')))} pages; live/ is {size:.1f} MB. To read it:")
    print(f"{sys.executable} -m http.server -d {site}")


if __name__ == "__main__":
    main()
