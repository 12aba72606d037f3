"""The training loop: one, used by the command line, the notebooks and the studies."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..faces.views import FaceViews
from ..metrics import FAR, recognition_by_yaw
from ..modules.prior import EnhancedTransformerWithPrior, PriorPreservationDataset, PriorPreservationLoss
from ..modules.transformer import EnhancedTransformerDecoderOnly3D, fuse_views
from ..paths import writable_folder
from .batches import count_batches, draw_batches, feed, padded_groups, place, view_groups
from .checkpoint import CheckpointError, load_base_weights, load_checkpoint, save_checkpoint
from .config import TrainConfig, choose_device
from .losses import LOSSES, Loss, mean_loss
from .mixup import Mixup, mix

FINAL_LR = 0.01  # of the learning rate, at the end of the cosine


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number; the message says where and what to try."""


@dataclass
class TrainResult:
    """history: one row per epoch. train_seconds: spent in training steps, without validation."""

    model: EnhancedTransformerDecoderOnly3D
    history: pd.DataFrame
    train_seconds: float
    steps: int = field(default=0)


def prepare_model(config: TrainConfig, feature_dim: int) -> tuple[EnhancedTransformerDecoderOnly3D, nn.Module | None]:
    """The model of a run, and the frozen base if prior preservation needs one; seeded by config.seed.

    Without a base there is nothing worth freezing: LoRA layers then train their random W as well.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model, base = config.build_model(feature_dim), config.build_model(feature_dim, base=True)
    if not config.base_model_path:
        model.requires_grad_(True)
    else:
        state = load_base_weights(config.base_model_path)
        model.load_base(state)
        if config.use_prior_preservation:
            if extra := sorted(set(state) - set(base.state_dict())):
                raise ValueError(f"prior preservation needs a plain base; {config.base_model_path} is adapted already "
                                 f"({len(extra)} parameters more, e.g. {extra[0]})")  # fmt: skip
            base.load_base(state)
        if config.freezes_base:
            for name in state:  # all of the base; of an adapted one the adapters, too
                model.get_parameter(name).requires_grad_(False)
    return model, base if config.use_prior_preservation else None


def train(
    config: TrainConfig,
    train_faces: FaceViews,
    val_faces: FaceViews,
    model: nn.Module | None = None,
    on_epoch: Callable[[pd.DataFrame], None] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train as config says.

    Args:
        train_faces, val_faces: different people; of train_faces the views within the config's yaw
            range are used. They lie on the device as a whole if they fit (see `place`).
        model: to train instead of the one that config describes (a baseline, say).
        on_epoch: called with the history so far after every epoch.

    Raises:
        TrainingDiverged: if the loss is not finite.
        ValueError: if there is nothing to train, or data and config disagree.
    """
    if overlap := set(train_faces.names) & set(val_faces.names):
        raise ValueError(f"{len(overlap)} people are in both training and validation, e.g. {min(overlap)!r}")
    impostors = len(val_faces) * (len(val_faces.names) - 1)
    if impostors * FAR < 1:
        raise ValueError(f"{len(val_faces.names)} validation people with {len(val_faces)} views make {impostors} "
                         f"impostor pairs, too few for a false accept rate of {FAR:g}; raise val_people")  # fmt: skip
    if model is not None and (config.base_model_path or config.use_prior_preservation):
        raise ValueError("a model given to train() is trained as it is: base_model_path and prior preservation are "
                         "for models that the config builds")  # fmt: skip
    device = choose_device(config.device)
    save_dir = writable_folder(config.save_dir) if config.save_dir else None
    log_dir = writable_folder(config.log_dir) if config.log_dir else None
    train_faces, val_faces = place(train_faces, device), place(val_faces, device)
    prior_faces = train_faces.where(train_faces.abs_yaw < config.prior_max_yaw)
    train_faces = train_faces.where((train_faces.abs_yaw >= config.min_yaw) & (train_faces.abs_yaw < config.max_yaw))
    if not len(train_faces):
        raise ValueError(f"no training view has {config.min_yaw} <= |yaw| < {config.max_yaw} degrees")

    front = train_faces.front.to(device)

    base = None
    if model is None:
        model, base = prepare_model(config, train_faces.feature_dim)
    model.to(device)
    task = prior = None
    if base:
        task = EnhancedTransformerWithPrior(model, base.to(device), config.lambda_prior, PriorPreservationLoss(front))
        prior_faces = prior_faces.in_memory().to(device)
        prior = PriorPreservationDataset(base, prior_faces.src, prior_faces.conditions())
    mixup = Mixup(train_faces) if config.mixup else None
    batches = count_batches(train_faces, config)
    windows = math.ceil(batches / config.gradient_accumulation_steps)
    optimizer = build_optimizer(model, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(config.warmup, config.epochs * windows))
    amp_dtype = amp_dtype_for(device) if config.use_amp else None
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    generator = torch.Generator().manual_seed(config.seed)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]

    history: list[dict[str, float]] = []
    seconds, steps, first_epoch = 0.0, 0, 0
    if config.resume:
        state = load_checkpoint(config.resume, device)
        if missing := {"model", "optimizer", "scheduler", "scaler", "generator", "torch_rng", "epoch"} - set(state):
            raise CheckpointError(f"{config.resume} holds weights, but no training run to go on with "
                                  f"(no {', '.join(sorted(missing))}); give it as base_model_path")  # fmt: skip
        if state["epoch"] >= config.epochs:
            raise ValueError(f"{config.resume} has {state['epoch']} epochs behind it; ask for more than that "
                             f"(epochs is {config.epochs})")  # fmt: skip
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        scaler.load_state_dict(state["scaler"])
        generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch_rng"].cpu())
        if device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), device)
        history, seconds, steps, first_epoch = state["history"], state["seconds"], state["steps"], state["epoch"]
    writer = _summary_writer(log_dir, first_epoch)
    if not config.resume:
        torch.manual_seed(config.seed)  # dropout
    best = min((row.get("val_loss", math.inf) for row in history), default=math.inf)

    bar = tqdm(range(first_epoch, config.epochs), disable=not progress, desc="epochs")
    for epoch in bar:
        (task or model).train()
        started = time.perf_counter()
        losses = torch.zeros(batches, device=device)
        rows = draw_batches(train_faces, config, generator)
        rows, weights = mixup.pair(rows, generator) if mixup else (rows, None)
        for i, batch in enumerate(feed(train_faces, rows, device, config.num_workers)):
            partner = weight = None
            if mixup:
                weight = weights[i].to(device)
                batch, partner = mix(batch, weight)
            person = batch.person
            loss_of = partial(mean_loss, LOSSES[config.loss], front, partner=partner, weight=weight)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                if task is None:
                    predicted = model(batch.src, **batch.conditions(), return_residual=False)
                    if config.use_cross_view:  # several views, one frontal embedding
                        predicted, person = fuse_views(predicted, config.n_views), person[:: config.n_views]
                    loss = loss_of(predicted, person)
                else:
                    kept = prior.sample(max(1, round(config.prior_fraction * len(person))), generator)
                    loss, _ = task.compute_loss(batch.src, batch.conditions(), person, loss_of, prior=kept)
            losses[i] = loss.detach()
            window = min(config.gradient_accumulation_steps, batches - i // config.gradient_accumulation_steps
                         * config.gradient_accumulation_steps)  # fmt: skip  # the last window may be shorter
            scaler.scale(loss / window).backward()
            if (i + 1) % config.gradient_accumulation_steps == 0 or i + 1 == batches:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(trainable, config.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                scheduler.step()
                steps += 1
        train_loss = losses.mean().item()  # the epoch's one wait for the device
        seconds += time.perf_counter() - started
        if not math.isfinite(train_loss):
            bad = int((~losses.isfinite()).float().argmax())
            raise TrainingDiverged(
                f"the loss is {losses[bad].item()} in batch {bad} of epoch {epoch + 1}; lower lr "
                f"({config.lr:g}) or lora_lr ({config.lora_lr:g})" + (", or switch use_amp off" * config.use_amp))

        row = {"epoch": epoch + 1, "train_loss": train_loss, "lr": scheduler.get_last_lr()[0], "seconds": seconds}
        if (epoch + 1) % config.val_every == 0 or epoch + 1 == config.epochs:
            row |= evaluate(model, val_faces, LOSSES[config.loss])
        history.append(row)
        bar.set_postfix({name: f"{row[name]:.3f}" for name in ("train_loss", "val_rank1") if name in row})
        _log(writer, row, losses, epoch * batches)
        if save_dir:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1,
                     "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict(), "history": history,
                     "generator": generator.get_state(), "torch_rng": torch.get_rng_state(), "seconds": seconds,
                     "steps": steps, "config": config.to_dict()}  # fmt: skip
            if device.type == "cuda":
                state["cuda_rng"] = torch.cuda.get_rng_state(device)
            if row.get("val_loss", math.inf) < best:
                save_checkpoint(save_dir / "best_model_enhanced.pth", state)
            if (epoch + 1) % config.save_every == 0 or epoch + 1 == config.epochs:
                save_checkpoint(save_dir / f"checkpoint_epoch_{epoch + 1}_enhanced.pth", state)
        best = min(best, row.get("val_loss", math.inf))
        if on_epoch:
            on_epoch(pd.DataFrame(history))
    if writer:
        writer.close()
    return TrainResult(model, pd.DataFrame(history), seconds, steps)


@torch.no_grad()
def predict(model: nn.Module, faces: FaceViews, batch_size: int = 1024) -> Tensor:
    """Predicted frontal embeddings (M, D) of all side views, in evaluation mode, on the device of faces.

    With cross-view attention, the views of a person are seen in random groups of n_views; the last group
    of a person may be smaller.
    """
    was_training, home = model.training, faces.device
    model.eval()
    device = next(iter((*model.parameters(), *model.buffers())), faces.src).device
    faces = place(faces, device)
    out = torch.empty(faces.src.shape, device=device)
    if getattr(model, "cross_view", None) is None:
        rows = torch.arange(len(faces), device=faces.device).split(batch_size)
        for index, batch in zip(rows, feed(faces, rows, device), strict=True):
            out[index] = model(batch.src, **batch.conditions(), return_residual=False).float()
    else:
        groups, mask = padded_groups(faces.person, model.n_views, torch.Generator().manual_seed(0))
        size = max(1, batch_size // model.n_views) * model.n_views
        rows, masks = groups.flatten().split(size), mask.flatten().to(device).split(size)
        for index, there, batch in zip(rows, masks, feed(faces, rows, device), strict=True):
            predicted = model(batch.src, **batch.conditions(), return_residual=False, view_mask=there)
            out[index.to(device)[there]] = predicted[there].float()
    model.train(was_training)
    return out.to(home)


@torch.no_grad()
def evaluate(model: nn.Module, faces: FaceViews, loss: Loss, batch_size: int = 1024) -> dict[str, float]:
    """val_loss, val_mse, val_cosine, val_rank1, val_tar and val_auc over all side views of faces.

    With cross-view attention over the fused predictions of whole groups, which is what it is trained for.
    """
    predicted, person, yaw = predict(model, faces), faces.person, faces.abs_yaw
    if getattr(model, "cross_view", None) is not None:
        groups = view_groups(person, model.n_views, torch.Generator().manual_seed(0))  # the groups of predict
        predicted = fuse_views(predicted[groups.flatten()], model.n_views)
        person, yaw = person[groups[:, 0]], yaw[groups].mean(1)
    parts = zip(predicted.split(batch_size), person.split(batch_size), strict=True)
    values = torch.cat([loss(part, faces.front, owners) for part, owners in parts])
    rates = recognition_by_yaw(predicted, faces.front, person, yaw)["all"]
    names = ("mse", "cosine", "rank1", "tar", "auc")
    return {"val_loss": values.mean().item()} | {f"val_{n}": rates[n] for n in names}


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with one group per role: LoRA and projection at lora_lr, base and cross-view attention at lr."""
    if hasattr(model, "parameter_groups"):
        roles = model.parameter_groups()
    else:
        roles = {"base": [p for p in model.parameters() if p.requires_grad]}
    if not roles:
        raise ValueError("the model has no trainable parameter: its base is frozen and nothing was added")
    groups = [{"params": params, "lr": config.lora_lr if role in ("lora", "projection") else config.lr, "role": role}
              for role, params in roles.items()]  # fmt: skip
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def warmup_cosine(warmup: float, steps: int) -> Callable[[int], float]:
    """Factor of the learning rate: linear from 0 to 1, then a cosine down to `FINAL_LR`."""
    rising = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, steps - rising)
        return FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    return factor


def amp_dtype_for(device: torch.device) -> torch.dtype:
    """bfloat16 on CPUs and on GPUs that compute it, float16 otherwise."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def _summary_writer(log_dir: Path | None, first_epoch: int):
    if log_dir is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('--log_dir needs TensorBoard: pip install "viewdiff_nb[tensorboard]"') from error
    return SummaryWriter(str(log_dir), purge_step=first_epoch or None)


def _log(writer, row: dict[str, float], losses: Tensor, first_step: int) -> None:
    if writer is None:
        return
    for i, loss in enumerate(losses.tolist()):
        writer.add_scalar("Train/Loss", loss, first_step + i)
    names = {"Train/LearningRate": "lr", "Epoch/TrainLoss": "train_loss", "Epoch/ValLoss": "val_loss",
             "Epoch/ValCosineSim": "val_cosine", "Epoch/ValRank1": "val_rank1", "Epoch/ValTAR": "val_tar"}  # fmt: skip
    for tag, key in names.items():
        if key in row:
            writer.add_scalar(tag, row[key], row["epoch"])
    writer.flush()
