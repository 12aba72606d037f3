"""Runs whose steps are CUDA graphs; what needs a GPU is a test only where there is one."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, DEVICES, run, sets

from viewdiff_nb.faces import load_face_views
from viewdiff_nb.training import loop as trainer
from viewdiff_nb.training import one_pass as together
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import GraphedFunction, set_capturable, with_cuda_graph
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.losses import LOSSES
from viewdiff_nb.training.one_pass import train_together
from viewdiff_nb.training.result import TrainingDiverged

GRAPH = replace(CONFIG, device="cuda", use_cuda_graph=True)
LORA = {"use_lora_attention": True, "use_projection_layer": True}


def test_it_needs_one_gpu():
    config = replace(CONFIG, use_cuda_graph=True)
    with pytest.raises(ValueError, match="use_cuda_graph needs a GPU, and this run is on device cpu"):
        run(config)
    with pytest.raises(ValueError, match="use_cuda_graph is for one process"):
        run(replace(config, devices=2))
    lora = replace(config, use_lora_attention=True, freeze_base=True, base_model_path="base.pth")
    with pytest.raises(ValueError, match="use_cuda_graph needs a GPU"):
        train_together([lora], *sets())


def test_it_takes_whole_steps():
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps is 2; give --no-use_cuda_graph"):
        TrainConfig(use_cuda_graph=True, gradient_accumulation_steps=2)


def test_an_optimiser_is_made_capturable_and_back():
    optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.25, fused=True)
    set_capturable(optimiser, torch.device("cpu"), True)
    [group] = optimiser.param_groups
    assert torch.is_tensor(group["lr"]) and group["lr"] == 0.25 and group["capturable"]
    set_capturable(optimiser, torch.device("cpu"), False)
    assert group["lr"] == 0.25 and isinstance(group["lr"], float) and not group["capturable"]


def test_studies_use_it_where_this_process_can_record(monkeypatch):
    config = replace(CONFIG, device="auto")
    assert not with_cuda_graph(replace(config, device="cpu")).use_cuda_graph
    monkeypatch.setattr("viewdiff_nb.training.devices.choose_device", lambda name: torch.device("cuda"))
    assert with_cuda_graph(config).use_cuda_graph
    for other in (replace(config, devices=2), replace(config, gradient_accumulation_steps=2)):
        assert with_cuda_graph(other) == other
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(with_cuda_graph, config).result() == config
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert with_cuda_graph(config) == config


class Replay:
    """Does as a recording does, on any device: it reads from fixed places, and every result lies where the last did."""

    def __init__(self, function, device):
        self.function, self.places = function, {}

    def __call__(self, *arguments):
        shapes = tuple(None if a is None else a.shape for a in arguments)
        buffers = self.places.setdefault(shapes, [None if a is None else a.clone() for a in arguments])
        for buffer, argument in zip(buffers, arguments, strict=True):
            if buffer is not None:
                buffer.copy_(argument)
        result = self.function(*buffers)
        return self.places.setdefault("result", result.clone()).copy_(result)


@pytest.fixture
def replayed(monkeypatch):
    """Runs with use_cuda_graph on the CPU, by `Replay`, or by what it is called with."""

    def stand_in(kind=Replay):
        monkeypatch.setattr(trainer, "GraphedFunction", kind)
        monkeypatch.setattr(together, "GraphedFunction", kind)

    stand_in()
    monkeypatch.setattr(TrainConfig, "one_device", lambda self: torch.device("cpu"))
    return stand_in


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixup": True, "use_lora_attention": True},
        {"use_cross_view": True, "n_views": 2},
        {"use_amp": True},
    ],
    ids=str,
)
def test_a_step_reads_nothing_but_its_arguments(replayed, changes):
    config = replace(CONFIG, batch_size=14, dropout=0.3, use_cuda_graph=True, **changes)
    one = run(config)
    replayed(lambda function, device: function)
    assert_same_runs(one, run(config), tolerance=0)


def test_nor_does_one_with_prior_samples_or_of_a_pass(replayed, base_path):
    config = replace(
        CONFIG,
        base_model_path=base_path,
        use_prior_preservation=True,
        mixup=True,
        use_lora_attention=True,
        use_cuda_graph=True,
    )
    passes = [
        [replace(config, seed=i, lora_lr=lr) for i, lr in enumerate(rates)] for rates in ((1e-3,) * 2, (1e-3, 0.1))
    ]
    one = [run(config)] + [result for configs in passes for result in train_together(configs, *sets())]
    replayed(lambda function, device: function)
    other = [run(config)] + [result for configs in passes for result in train_together(configs, *sets())]
    for a, b in zip(one, other, strict=True):
        assert_same_runs(a, b, tolerance=0)


def test_rates_on_the_device_are_the_rates(replayed, base_path):
    """But for the rounding to float32."""
    config = replace(CONFIG, mixup=True, use_lora_attention=True, base_model_path=base_path)
    configs = [replace(config, seed=seed) for seed in range(2)]
    with_graph = [replace(c, use_cuda_graph=True) for c in configs]
    assert_same_runs(run(with_graph[0]), run(config))
    for one, other in zip(train_together(with_graph, *sets()), train_together(configs, *sets()), strict=True):
        assert_same_runs(one, other)


@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True)])
def test_a_checkpoint_serves_runs_with_and_without(replayed, tmp_path, first, then):
    config = replace(CONFIG, epochs=4, save_every=1, dropout=0.3)
    whole = run(replace(config, use_cuda_graph=first, save_dir=str(tmp_path)))
    start = str(tmp_path / "checkpoint_epoch_2_enhanced.pth")
    assert_same_runs(whole, run(replace(config, use_cuda_graph=then, resume=start)))


@pytest.mark.parametrize("graph", [False, True])
def test_a_run_that_ended_holds_no_memory(replayed, base_path, monkeypatch, graph):
    """Not even until the garbage is collected: a GPU's memory would be short for the next run."""
    alive = []
    for module, name in ((trainer, "_Run"), (together, "_Pass")):
        kind = getattr(module, name)
        monkeypatch.setattr(kind, "run", lambda self, run=kind.run: (alive.append(weakref.ref(self)), run(self))[1])
    config = replace(CONFIG, use_lora_attention=True, base_model_path=base_path, epochs=1, use_cuda_graph=graph)
    gc.disable()
    try:
        run(config)
        train_together([config, replace(config, seed=1)], *sets())
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def assert_same_runs(one, other, tolerance=1e-5):
    assert one.steps == other.steps and one.stopped == other.stopped
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


if "cuda" in DEVICES:
    CHANGES = {
        "full": {},
        "dropout": {"dropout": 0.3},
        "LoRA, projection, mix-up": LORA | {"mixup": True, "rank": 4},
        "mixed precision": LORA | {"use_amp": True},
        "cross-view": {"use_cross_view": True, "n_views": 2},
        "pairs": {"loss": "two-way+pairs", "paired_views": True},
    } | {loss: {"loss": loss} for loss in LOSSES if "pairs" not in loss}

    def assert_close_runs(one, other, rel=1e-3):
        assert one.steps == other.steps and one.stopped == other.stopped
        for column in ("train_loss", "lr", "grad_norm", "val_loss"):
            mine, theirs = (result.history[column].tolist() for result in (one, other))
            assert mine == pytest.approx(theirs, rel=rel, nan_ok=True), column

    @pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
    def test_a_run_of_graphs_is_the_run_without(changes):
        """With a last batch of its own shape, and dropout from the same random numbers."""
        config = replace(GRAPH, batch_size=14, epochs=6, **changes)
        assert_close_runs(run(config), run(replace(config, use_cuda_graph=False)))

    def test_float16_with_its_scaler(monkeypatch):
        monkeypatch.setattr("viewdiff_nb.training.losses.amp_dtype_for", lambda device: torch.float16)
        config = replace(GRAPH, use_amp=True, epochs=4)
        assert_close_runs(run(config), run(replace(config, use_cuda_graph=False)), rel=1e-2)

    def test_prior_samples_are_drawn_as_without(base_path):
        config = replace(GRAPH, base_model_path=base_path, use_prior_preservation=True, min_yaw=45.0, epochs=4, **LORA)
        one, other = run(config), run(replace(config, use_cuda_graph=False))
        assert_close_runs(one, other)
        assert one.history["prior_loss"].tolist() == pytest.approx(
            other.history["prior_loss"].tolist(), rel=1e-2, nan_ok=True
        )

    @pytest.mark.parametrize("then", [True, False])
    def test_a_run_goes_on_with_or_without_graphs(tmp_path, then):
        config = replace(GRAPH, epochs=4, save_every=1, dropout=0.3, mixup=True)
        whole = run(replace(config, save_dir=str(tmp_path)))
        start = str(tmp_path / "checkpoint_epoch_2_enhanced.pth")
        assert_close_runs(whole, run(replace(config, resume=start, use_cuda_graph=then)))
        eager = run(replace(config, use_cuda_graph=False, save_dir=str(tmp_path / "eager")))
        start = str(tmp_path / "eager/checkpoint_epoch_2_enhanced.pth")
        assert_close_runs(eager, run(replace(config, resume=start, use_cuda_graph=then)))

    def test_a_set_on_disk_feeds_it(face_set):
        faces = load_face_views(face_set, mmap=True)
        config = replace(GRAPH, batch_size=8, num_workers=1, epochs=3)
        results = [train(c, faces, sets()[1], progress=False) for c in (config, replace(config, use_cuda_graph=False))]
        assert_close_runs(*results)

    @pytest.mark.parametrize("rates", [[1e-3, 1e-3, 1e-3], [1e-3, 1e-2, 5e-3]])
    @pytest.mark.parametrize("prior", [False, True])
    def test_a_pass_of_graphs_is_the_pass_without(base_path, rates, prior):
        config = replace(GRAPH, base_model_path=base_path, use_prior_preservation=prior, mixup=True, epochs=4, **LORA)
        configs = [replace(config, seed=seed, rank=2 + seed, lora_lr=rate) for seed, rate in enumerate(rates)]
        graphs = train_together(configs, *sets())
        plain = train_together([replace(c, use_cuda_graph=False) for c in configs], *sets())
        for one, other in zip(graphs, plain, strict=True):
            assert one.history["train_loss"].tolist() == pytest.approx(
                other.history["train_loss"].tolist(), rel=1e-3, nan_ok=True
            )
            assert one.history["val_loss"].tolist() == pytest.approx(other.history["val_loss"].tolist(), rel=1e-3)

    def test_every_set_of_shapes_has_a_recording_of_its_own():
        weight = torch.ones((), device="cuda")

        def work(x, y):
            weight.add_(1)
            return x * weight if y is None else x + y

        captured = GraphedFunction(work, torch.device("cuda"), warmup=1)
        for i in range(6):
            x = torch.full((3 + i % 2,), float(i), device="cuda")
            assert torch.equal(captured(x, None), x * (2 + i))
            assert captured.recorded.keys() == set(list(captured.calls)[: max(0, i - 1)])
        assert torch.equal(captured(x, x), 2 * x)

    def test_what_cannot_be_recorded_is_told():
        captured = GraphedFunction(lambda x: x * x.sum().item(), torch.device("cuda"), warmup=1)
        x = torch.ones(2, device="cuda")
        assert captured(x).tolist() == [2, 2]
        with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph.*give --no-use_cuda_graph"):
            captured(x)
        assert (x + 1).tolist() == [2, 2]  # the device goes on, and its random numbers do
        assert torch.nn.functional.dropout(x.expand(100, 2), 0.5).sum() > 0
        again = GraphedFunction(torch.nn.functional.dropout, torch.device("cuda"), warmup=1)
        assert len({again(x.expand(100, 2)).sum().item() for _ in range(5)}) > 1

    def test_it_finds_what_diverged():
        with pytest.raises(TrainingDiverged, match="has loss"):
            run(replace(GRAPH, lr=1e30, epochs=20))
