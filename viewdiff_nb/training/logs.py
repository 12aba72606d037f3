"""What is seen of a run while it runs: a progress bar with loss and rate, and TensorBoard under the guide's names."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

EPOCH_TAGS = {"Epoch/TrainLoss": "train_loss", "Epoch/PriorLoss": "prior_loss", "Epoch/ValLoss": "val_loss",
              "Epoch/ValCosineSim": "val_cosine", "Epoch/ValRank1": "val_rank1", "Epoch/ValTAR": "val_tar"}  # fmt: skip


class TrainingLog:
    """
    Args:
        log_dir: of the event files; None for none.
        epochs, batches: of the run, and of an epoch.
        done: batches that an earlier run did.
        progress: whether to show a bar.
    """

    def __init__(self, log_dir: Path | None, epochs: int, batches: int, done: int, progress: bool) -> None:
        self.writer, self.batches, self.epochs = None, batches, epochs
        if log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # here, for it takes a second

            self.writer = SummaryWriter(str(log_dir))
        self.bar = tqdm(total=epochs * batches, initial=done, unit="batch", dynamic_ncols=True,
                        disable=not progress or sys.stderr is None)  # fmt: skip
        self.shown: dict[str, str] = {}

    def batch(self, epoch: int, count: int) -> None:
        """count batches more; epoch: the one they belong to, from 1."""
        self.bar.set_description(f"epoch {epoch}/{self.epochs}", refresh=False)
        self.bar.update(count)

    def show(self, **values: float) -> None:
        """Numbers at the end of the bar, until they are shown anew."""
        self.shown |= {name: f"{value:.3g}" for name, value in values.items()}
        self.bar.set_postfix(self.shown)

    def losses(self, first: int, losses: Sequence[float], rates: Sequence[float]) -> None:
        """Losses and learning rates of an epoch's batches; first: the number of its first batch in the run."""
        if self.writer is None:
            return
        for i, (loss, rate) in enumerate(zip(losses, rates, strict=True), first):
            self.writer.add_scalar("Train/Loss", loss, i)
            self.writer.add_scalar("Train/LearningRate", rate, i)

    def epoch(self, row: dict[str, float]) -> None:
        """A row of the history."""
        self.show(**{name: row[name] for name in ("train_loss", "val_rank1") if name in row})
        if self.writer is None:
            return
        for tag, key in EPOCH_TAGS.items():
            if key in row:
                self.writer.add_scalar(tag, row[key], row["epoch"])
        self.writer.flush()

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
