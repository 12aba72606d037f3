"""The site: whole, at home in one folder, searchable; and its page that predicts without a kernel says what torch says."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from playwright.sync_api import expect

from viewdiff_nb.drop_in import DropIn
from viewdiff_nb.faces import load_face_views, split_by_person
from viewdiff_nb.faces.turntable import load_turntable
from viewdiff_nb.files import HEADS
from viewdiff_nb.pretrained import load_pretrained

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built once, whichever of pytest's processes comes first."""
    own = tmp_path_factory.getbasetemp()
    out = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "the_site"
    with FileLock(f"{out}.lock"):
        if not (out / "done").is_file():
            done = subprocess.run([sys.executable, ROOT / "docs/site/build.py", out], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            (out / "done").touch()
    return out / "site"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Links(HTMLParser):
    """What a page leads to, and what it loads; and the names of its places."""

    def __init__(self, page):
        super().__init__()
        self.followed, self.loaded, self.places = [], [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.places |= {found[key] for key in ("id", "name") if found.get(key)}
        for key in ("href", "src"):
            if found.get(key):
                loads = tag in ("script", "img", "iframe", "source") or found.get("rel") in ("stylesheet", "icon")
                (self.loaded if loads else self.followed).append(found[key])


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) >= 30
    for page, links in pages.items():
        assert [link for link in links.loaded if re.match(r"(https?:)?//", link)] == [], page
        for link in links.loaded + links.followed:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.relative_to(site)}: {link}"
            if parts.fragment and target in pages and "notebooks" not in target.parts:
                assert unquote(parts.fragment) in pages[target].places, f"{page.relative_to(site)}: {link}"


def test_public_names_are_in_the_api(site):
    text = (site / "api" / "modules.html").read_text(encoding="utf-8")
    for name in (
        "lora.LoRALinearLayer",
        "attention.PoseConditionedLoRAAttention",
        "projection.LightweightFaceProjectionLayer",
    ):
        assert f'id="viewdiff_nb.modules.{name}"' in text, name


def test_the_search_finds_a_class(page, address):
    page.goto(f"{address}/index.html")
    page.get_by_role("textbox", name="Search").fill("PoseConditionedLoRAAttention")
    expect(page.locator(".md-search-result__item").first).to_be_visible(timeout=30_000)


def wanted(person, pitch, yaw):
    """Of raw view, drop-in and the network's whole answer: the cosine with the own front, the best other one, the rank."""
    table, gallery = load_turntable(), split_by_person(load_face_views(HEADS), val=200, test=300).test
    shipped = load_pretrained("mobilefacenet")
    view = table.row(person, pitch)
    view = view.where(torch.tensor([table.closest(person, pitch, yaw)]))
    inputs = view.src, view.angles, view.keypoints_3d
    whole = DropIn(shipped.model, [(1.0, "none")] * 5).eval()
    found = [view.src, *(model(*inputs, return_residual=False) for model in (shipped, whole))]
    own, fronts = gallery.names.index(table.names[person]), F.normalize(gallery.front, dim=1)
    for prediction in found:
        cosine = (F.normalize(prediction, dim=1) @ fronts.T)[0]
        others = torch.cat((cosine[:own], cosine[own + 1 :]))
        yield cosine[own].item(), others.max().item(), 1 + int((others >= cosine[own]).sum())


def shown(page):
    for row in page.locator("#live-table tbody tr").all():
        _, own, other, rank = row.locator("td").all_inner_texts()
        yield float(own), float(other), int(rank.removesuffix(": found"))


def test_the_live_page_says_what_torch_says(page, address, site):
    assert sum(path.stat().st_size for path in (site / "live").iterdir()) <= 20e6
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(f"{address}/live/index.html")
    expect(page.locator("#live")).to_have_attribute("data-state", "ready", timeout=60_000)
    yaw, pitch = page.get_by_role("slider", name="Yaw"), page.get_by_role("slider", name="Pitch")
    head = page.locator("#live-head")
    before = head.screenshot()
    for person, up, turned in ((5, 0, 85), (7, -20, 60), (2, 10, -90)):
        page.get_by_role("combobox", name="Person").select_option(str(person))
        pitch.fill(str(up))
        yaw.fill(str(turned))
        expect(page.locator("#live-yaw-value")).to_have_text(f"{turned}°")
        wish = list(wanted(person, up, turned))
        expect(page.locator("#live-table tbody tr").nth(2).locator("td").nth(1)).to_have_text(f"{wish[2][0]:.3f}")
        for (own, other, rank), found in zip(wish, shown(page), strict=True):
            assert found == (pytest.approx(own, abs=1.5e-3), pytest.approx(other, abs=1.5e-3), rank)
    assert head.screenshot() != before
    cursor = page.locator("#live-cursor")
    left = cursor.get_attribute("x1")
    yaw.press("ArrowRight")  # by keyboard
    expect(page.locator("#live-yaw-value")).to_have_text("-85°")
    assert float(cursor.get_attribute("x1")) > float(left)
    assert errors == [] and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def test_a_page_that_cannot_start_says_so(page, address):
    page.route("**/network.onnx", lambda route: route.abort())
    page.goto(f"{address}/live/index.html")
    expect(page.get_by_role("status")).to_contain_text("could not be started")
