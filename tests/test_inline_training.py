"""Training in the cells of a notebook: a live figure, the stop button, and two processes."""

import re
import time
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

SETUP = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from dataclasses import replace
from conftest import CONFIG, sets
from viewdiff_nb.plots import LiveCurves
from viewdiff_nb.training.loop import train
"""


class Kernel:
    """A kernel as a notebook has it: runs cells, and gathers what they show."""

    def __init__(self) -> None:
        self.manager, self.client = start_new_kernel()

    def start(self, code: str) -> str:
        return self.client.execute(code)

    def shown(self, cell: str, until=lambda messages: False) -> list[dict]:
        """The messages of a cell until it is done, or until enough are there."""
        messages: list[dict] = []
        while True:
            message = self.client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != cell:
                continue
            messages.append(message)
            assert message["msg_type"] != "error", "\n".join(message["content"]["traceback"])
            if message["content"].get("execution_state") == "idle" or until(messages):
                return messages

    def run(self, code: str) -> list[dict]:
        return self.shown(self.start(code))

    def text(self, code: str) -> str:
        return "".join(m["content"]["text"] for m in self.run(code) if m["msg_type"] == "stream")


@pytest.fixture(scope="module")
def kernel():
    kernel = Kernel()
    kernel.run(SETUP)
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


def test_the_live_figure_is_one_picture_updated_in_place(kernel):
    messages = kernel.run("result = train(replace(CONFIG, epochs=3), *sets(), on_epoch=LiveCurves(), progress=False)")
    pictures = [m for m in messages if "image/png" in m["content"].get("data", {})]
    assert [m["msg_type"] for m in pictures] == ["display_data", "update_display_data", "update_display_data"]
    assert len({m["content"]["transient"]["display_id"] for m in pictures}) == 1
    assert len({m["content"]["data"]["image/png"] for m in pictures}) == 3


def test_the_stop_button_stops_cleanly_and_the_notebook_goes_on(kernel, tmp_path):
    kernel.run(
        f"config = replace(CONFIG, epochs=100_000, save_every=10**6, val_every=10**6, save_dir={str(tmp_path)!r})"
    )
    cell = kernel.start("stopped = train(config, *sets())")
    kernel.shown(cell, until=lambda messages: len(messages) > 5)  # the bar moves
    time.sleep(0.3)
    kernel.manager.interrupt_kernel()
    kernel.shown(cell)
    assert re.fullmatch(r"interrupted .*last_enhanced.pth\n", kernel.text("print(stopped.stopped, stopped.checkpoint)"))
    onward = """
epochs = len(stopped.history) + 2
result = train(replace(config, epochs=epochs, resume="auto", save_every=1, val_every=1), *sets(), progress=False)
print(result.stopped, len(result.history) == epochs, result.steps == 15 * epochs)
"""
    said = kernel.text(onward)
    assert "finished True True\n" in said and "goes on from" in said and "epochs " in said


def test_two_processes_inline(kernel):
    code = """
exact = replace(CONFIG, dropout=0.0, epochs=2)
one, two = (train(replace(exact, devices=devices), *sets(), progress=False) for devices in (1, 2))
import torch
print(all(torch.allclose(a, b, rtol=1e-3, atol=1e-5)
          for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True)))
"""
    assert kernel.text(code).endswith("True\n")
