"""A real JupyterLab (or Notebook 7) in a real, headless Chromium."""

import base64
import io
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
from chromium import CHROMIUM
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Playwright

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
QUIET = '{"fetchNews": "false", "checkForUpdates": false}'
ALL_RUN = r"""() => { const c = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')]
    .map(e => e.textContent.trim()); return c.length && c.every(s => /^\[\d+\]/.test(s)) }"""
FAILED = '[data-mime-type="application/vnd.jupyter.error"]'
COMPLAINED = '[data-mime-type="application/vnd.jupyter.stderr"]'


class Lab:
    """The server, with a configuration of its own.

    Args:
        root: folder of the notebooks. config: an empty folder. environment: for the kernels.
    """

    def __init__(self, root: Path, config: Path, environment: dict[str, str]) -> None:
        settings = config / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text(QUIET)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.token, self.root, self.log = secrets.token_hex(16), root, config / "server.log"
        command = [
            Path(sys.executable).parent / "jupyter",
            "lab",
            "--no-browser",
            "--allow-root",
            "--ip=127.0.0.1",
            f"--port={self.port}",
            "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={self.token}",
            f"--ServerApp.root_dir={root}",
        ]
        own = {"JUPYTER_CONFIG_DIR": str(config), "JUPYTER_RUNTIME_DIR": str(config / "run")}
        environment = os.environ | own | environment
        with self.log.open("wb") as log:
            self.server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api?token={self.token}", timeout=1)
                return
            except OSError:
                if time.monotonic() > end or self.server.poll() is not None:
                    self.close()
                    raise RuntimeError(f"JupyterLab did not start:\n{self.log.read_text(encoding='utf-8')}") from None
                time.sleep(0.1)

    def close(self) -> None:
        """Stop the server and its kernels; one that is just restarting may need to be killed."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(self.server.pid, number)
            try:
                self.server.wait(15)
                return
            except subprocess.TimeoutExpired:
                continue

    def open(self, page: Page, notebook: str, app: str = "lab") -> None:
        """Open a notebook and wait for its kernel; before it is there, Run All would be lost."""
        route = "lab/tree" if app == "lab" else "notebooks"
        fresh = "reset&" if app == "lab" else ""
        page.goto(f"http://127.0.0.1:{self.port}/{route}/{notebook}?{fresh}token={self.token}")
        page.wait_for_selector('.jp-Toolbar-kernelName:has-text("Python 3")', timeout=60_000)
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', state="attached", timeout=60_000)

    def run_all(self, page: Page, timeout: float = 300) -> None:
        """Run all cells; none may fail, nor write to stderr."""
        menu(page, "Run", "runmenu:run-all")
        page.wait_for_function(ALL_RUN, timeout=1000 * timeout)
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', state="attached")
        for selector in (FAILED, COMPLAINED):
            assert not (found := page.locator(selector)).count(), found.first.inner_text()


def launch(playwright: Playwright) -> Browser:
    return playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)


def menu(page: Page, name: str, command: str) -> None:
    page.click(f'.lm-MenuBar-item:has-text("{name}") >> nth=0')
    page.click(f'.lm-Menu-item[data-command="{command}"]')


def write_notebook(path: Path, *cells: str) -> None:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


def stage(page: Page, label: str) -> Locator:
    """The stage whose picture's description starts so."""
    return page.locator(f'.vd-frame:has(img[alt^="{label}"])')


def pixels(stage: Locator) -> np.ndarray:
    """The picture that a stage shows, as it was sent: (height, width, 3) uint8."""
    data = stage.locator("img").evaluate("""async image => {
        const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
        let text = ''; for (const b of bytes) text += String.fromCharCode(b); return btoa(text); }""")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def wait_for_picture(stage: Locator, accept, timeout: float = 10) -> np.ndarray:
    """The picture, once accept(pixels) is true.

    Raises:
        AssertionError: if that takes longer than timeout seconds.
    """
    end = time.monotonic() + timeout
    while True:
        shown = pixels(stage)
        if accept(shown):
            return shown
        assert time.monotonic() < end, "the picture did not become what it should be"
        time.sleep(0.05)


def handle(page: Page, name: str) -> Locator:
    """What to drag, or to focus, of the slider with this description."""
    return page.locator(f'.widget-slider:has(label:text-is("{name}")) .noUi-handle')


def choose(page: Page, name: str, option: str) -> None:
    page.locator(f'.widget-dropdown:has(label:text-is("{name}")) select').select_option(option)
