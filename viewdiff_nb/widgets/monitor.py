"""Watch a training run, stop it, and go on."""

import html
import threading
import time
from dataclasses import replace

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from viewdiff_nb.faces.views import FaceViews
from viewdiff_nb.plots import learning_curves
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import OwnRandomness
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.result import StopRequest, TrainResult
from viewdiff_nb.widgets.explorer import DPI, LOOK, Explorer, Stage, png


class TrainingMonitor(Explorer):
    """Train beside the notebook: curves that grow, a stop that keeps what was learned, and going on from there.

        monitor = TrainingMonitor(TrainConfig(..., save_dir="runs/mine"), split.train, split.val)
        monitor                     # shows it; its buttons start, stop and go on
        monitor.start().wait()      # the same without a mouse
        monitor.result.model

    The run is in a thread of its own, so the notebook answers meanwhile. Its random numbers are its own: cells do
    not change what it learns, nor does it change what cells draw; on a GPU its dropout differs from `train`'s.
    `train(..., on_epoch=monitor.show)` shows a run that was started elsewhere.

    Args:
        config: with a save_dir, or there is nothing to go on from. Its use_cuda_graph and use_compile are left
            out: a graph cannot be recorded while another thread uses the GPU.
    """

    def __init__(self, config: TrainConfig, train_faces: FaceViews, val_faces: FaceViews) -> None:
        self.config, self.faces = replace(config, use_cuda_graph=False, use_compile=False), (train_faces, val_faces)
        self.result: TrainResult | None = None
        self.error: BaseException | None = None
        self.history = pd.DataFrame()
        self._thread: threading.Thread | None = None
        self._running, self._stop = False, StopRequest()
        self._started, self._first = 0.0, 0  # when this thread's run began, and at which epoch
        self.start_button = widgets.Button(description="Start", icon="play", button_style="primary")
        self.stop_button = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.progress = widgets.IntProgress(0, 0, config.epochs, description="epochs", **LOOK)
        self.status = widgets.HTML("not started")
        self.curves = Stage(width=760, label="loss, rank-1 and TAR over epochs")
        super().__init__([[self.start_button, self.stop_button, self.progress, self.status], [self.curves]])
        self.start_button.on_click(self._pressed)
        self.stop_button.on_click(lambda _: self.stop())
        self.redraw()

    def start(self) -> "TrainingMonitor":
        """Start, or go on from the last checkpoint if the run was stopped before.

        Raises:
            RuntimeError: if it is running, or was stopped without a save_dir to go on from.
        """
        if self._running:
            raise RuntimeError("this run is still going on; stop() it first")
        config, self._first = self.config, 0
        if self.result is not None and self.result.stopped == "interrupted":
            if self.result.checkpoint is None:
                raise RuntimeError("the run was stopped and nothing was kept; give TrainConfig a save_dir")
            config, self._first = replace(config, resume=str(self.result.checkpoint)), self.progress.value
        self._stop, self.error, self._started = StopRequest(), None, time.monotonic()
        self._set_running(True)
        self._thread = threading.Thread(target=self._run, args=(config,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the run after the step it is in, if there is one; the checkpoint is written."""
        if self._running:
            self._stop.asked = True
            self.status.value = "stopping …"

    def wait(self) -> TrainResult:
        """The result, when the run has ended; an interrupt of the cell stops the run.

        Raises:
            whatever ended the run, e.g. TrainingDiverged.
        """
        if self._thread is None:
            raise RuntimeError("not started; call start()")
        try:
            self._thread.join()
        except KeyboardInterrupt:
            self.stop()
            self._thread.join()
        if self.error is not None:
            raise self.error
        assert self.result is not None  # a run ends with one of the two
        return self.result

    def show(self, history: pd.DataFrame) -> None:
        """Draw a run's history so far."""
        self.history, left = history, ""
        epoch = self.progress.value = int(history["epoch"].iloc[-1])
        if self._running and epoch > self._first:
            spent = time.monotonic() - self._started
            left = f", about {spent / (epoch - self._first) * (self.config.epochs - epoch):.0f} s left"
        self.status.value = f"epoch {epoch} of {self.config.epochs}{left}"
        self.redraw()

    def _pressed(self, _: widgets.Button) -> None:
        try:
            self.start()
        except RuntimeError as error:  # there is no cell that could show it
            self.status.value = str(error)

    def _run(self, config: TrainConfig) -> None:
        try:
            with OwnRandomness():
                self.result = result = train(config, *self.faces, on_epoch=self.show, progress=False, stop=self._stop)
            ended = f"{result.stopped} after {result.steps} steps, {result.train_seconds:.0f} s of training"
        except BaseException as error:  # shown here, and raised again by wait()
            self.error, ended = error, f"<b>{type(error).__name__}</b>: {html.escape(str(error))}"
        self._set_running(False)
        self.status.value = ended

    def _set_running(self, running: bool) -> None:
        self._running = self.start_button.disabled = running
        self.stop_button.disabled = not running
        stopped = self.result is not None and self.result.stopped == "interrupted"
        self.start_button.description = "Go on" if stopped else "Start"

    def _draw(self) -> None:
        self.curves.picture = png(self.figure())

    def figure(self) -> Figure:
        return learning_curves(self.history, Figure((9, 3.2), DPI, layout="constrained"))
