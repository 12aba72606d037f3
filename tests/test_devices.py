"""CUDA graphs, on a GPU where there is one; random numbers of a thread."""

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, DEVICES, run, sets
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from viewdiff_nb.faces import load_face_views
from viewdiff_nb.modules.baselines import MLP
from viewdiff_nb.training import loop, one_pass
from viewdiff_nb.training.checkpoint import build_model, prepare_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.devices import (
    GraphedFunction,
    OwnRandomness,
    Processes,
    connect,
    generator,
    manual_seed,
    set_capturable,
    with_cuda_graph,
)
from viewdiff_nb.training.loop import train
from viewdiff_nb.training.losses import LOSSES
from viewdiff_nb.training.one_pass import train_together
from viewdiff_nb.training.result import TrainingDiverged, TrainResult

CPU = torch.device("cpu")


def test_several_devices_need_torchrun():
    assert connect(CONFIG) == Processes(CPU, count=1, rank=0)
    with pytest.raises(ValueError, match=r"devices=3 .*torchrun --nproc_per_node 3 -m viewdiff_nb\.train_enhanced"):
        run(replace(CONFIG, devices=3))


@pytest.mark.parametrize(("rank", "batch_size", "warned"), [(0, 512, True), (1, 512, False), (0, 2048, False)])
def test_that_several_gpus_do_not_pay_is_said_before_the_first_step(monkeypatch, rank, batch_size, warned):
    """In one of two processes of a machine whose GPUs are made up."""
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("viewdiff_nb.training.devices.choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": rank}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert connect(replace(CONFIG, batch_size=batch_size)) == Processes(torch.device("cuda", rank), 2, rank)
    assert [str(w.message) for w in seen] == warned * [
        "2 GPUs share batches of 512, which one trains about as fast; use one, with --use_cuda_graph, or a batch_size of "
        "2048 or more"
    ]


GRAPH = replace(CONFIG, device="cuda", use_cuda_graph=True)
LORA = {"use_lora_attention": True, "use_projection_layer": True}


def test_a_graph_needs_one_gpu():
    config = replace(CONFIG, use_cuda_graph=True)
    with pytest.raises(ValueError, match="use_cuda_graph needs a GPU, and this run is on device cpu"):
        run(config)
    lora = replace(config, use_lora_attention=True, freeze_base=True, base_model_path="base.pth")
    with pytest.raises(ValueError, match="use_cuda_graph needs a GPU"):
        train_together([lora], *sets())


def test_a_graph_takes_whole_steps():
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps is 2.*give --no-use_cuda_graph"):
        TrainConfig(use_cuda_graph=True, gradient_accumulation_steps=2)


def test_compiled_steps_are_for_one_process(monkeypatch):
    with pytest.raises(ValueError, match=r"use_compile is for one process, and devices is 2; give --no-use_compile"):
        TrainConfig(use_compile=True, devices=2)
    with pytest.raises(ValueError, match="use_compile is for runs that are trained alone"):
        train_together([replace(CONFIG, use_compile=True, **LORA, base_model_path="base.pth")], *sets())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="use_compile is for one process, and this run has several"):
        connect(replace(CONFIG, use_compile=True))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="use_compile needs a GPU, and this run is on device cpu"):
        run(replace(CONFIG, use_compile=True))


def test_a_run_goes_on_without_a_compiler(replayed, monkeypatch):
    def compile_nothing(function, dynamic):
        def program(*arguments):
            raise TorchDynamoException("no compiler\nand much more")

        return program

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.warns(UserWarning, match=r"torch\.compile failed, so the step runs as it is \(no compiler\)$") as seen:
        found = run(replace(CONFIG, use_compile=True))
    assert len(seen) == 1
    assert_same_runs(run(CONFIG), found, tolerance=0)


def test_an_optimiser_is_made_capturable_and_back():
    optimiser = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=0.25, fused=True)
    set_capturable(optimiser, CPU, True)
    [group] = optimiser.param_groups
    assert torch.is_tensor(group["lr"]) and group["lr"] == 0.25 and group["capturable"]
    set_capturable(optimiser, CPU, False)
    assert group["lr"] == 0.25 and isinstance(group["lr"], float) and not group["capturable"]


def test_studies_use_graphs_where_this_process_can_record(monkeypatch):
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
    """Reads and writes as a recording does, on any device: always the same tensors."""

    def __init__(self, function, device):
        self.function, self.tensors = function, {}

    def __call__(self, *arguments):
        shapes = tuple(None if a is None else a.shape for a in arguments)
        buffers = self.tensors.setdefault(shapes, [None if a is None else a.clone() for a in arguments])
        for buffer, argument in zip(buffers, arguments, strict=True):
            if buffer is not None:
                buffer.copy_(argument)
        result = self.function(*buffers)
        return self.tensors.setdefault("result", result.clone()).copy_(result)


@pytest.fixture
def replayed(monkeypatch):
    """Runs with use_cuda_graph on the CPU, by `Replay`, or by what it is called with."""

    def stand_in(kind: Callable = Replay) -> None:
        for module in (loop, one_pass):
            monkeypatch.setattr(module, "GraphedFunction", kind)
            monkeypatch.setattr(module, "connect", lambda config: Processes(CPU))

    stand_in()
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
def test_a_run_that_ended_holds_no_memory(replayed, base_path, graph):
    """Not even until the garbage is collected: a GPU's memory would be short for the next run."""
    config = replace(CONFIG, use_lora_attention=True, base_model_path=base_path, epochs=1, use_cuda_graph=graph)
    for trained in (
        lambda *faces: train(config, *faces, progress=False),
        lambda *faces: train_together([config, replace(config, seed=1)], *faces),
    ):
        faces = sets()
        held = weakref.ref(faces[1].src)
        gc.disable()
        try:
            result = trained(*faces)
            del faces
            assert held() is None and result
        finally:
            gc.enable()


def assert_same_runs(one: TrainResult, other: TrainResult, tolerance: float = 1e-5) -> None:
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

    @pytest.mark.slow
    @pytest.mark.parametrize("changes", [{}, {"mixup": True}, LORA, {"use_cross_view": True, "n_views": 2}], ids=str)
    @pytest.mark.parametrize("graph", [True, False])
    def test_a_compiled_run_is_the_run_without(changes, graph):
        config = replace(GRAPH, batch_size=14, dropout=0.0, use_cuda_graph=graph, **changes)
        assert_close_runs(run(replace(config, use_compile=True)), run(config), rel=1e-2)

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


DRAWS = {
    "dropout": lambda: nn.functional.dropout(torch.ones(50, 7), 0.3),
    "dropout layer": lambda: nn.Dropout(0.5)(torch.ones(50, 7, dtype=torch.bfloat16)),
    "baseline": lambda: MLP(32, 48)(torch.ones(4, 32), torch.zeros(4, 3), torch.ones(4, 5, 3)),
    "linear": lambda: nn.Linear(7, 5).weight,
    "convolution": lambda: nn.Conv3d(2, 3, 3).bias,
    "normal": lambda: nn.init.normal_(torch.empty(6, 6), std=0.2),
    "randn": lambda: torch.randn(3, 3),
    "model": lambda: torch.cat([p.flatten() for p in build_model(CONFIG, 32).parameters()]),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_numbers_are_those_of_a_process_with_that_seed_which_is_left_alone(draw):
    torch.manual_seed(5)
    wanted = draw(), draw()
    before = torch.get_rng_state()
    with OwnRandomness(5):
        first = draw()
        state = generator(CPU).get_state()
        second = draw()
        manual_seed(5)
        again = draw()
        generator(CPU).set_state(state)
        assert torch.equal(draw(), second)
    assert torch.equal(first, wanted[0]) and torch.equal(second, wanted[1]) and torch.equal(again, first)
    assert torch.equal(torch.get_rng_state(), before)


def test_outside_of_it_the_processs_generator_is_meant():
    manual_seed(3)
    assert generator(CPU) is torch.default_generator and torch.initial_seed() == 3


def test_it_is_of_one_thread_and_can_be_nested():
    torch.manual_seed(1)
    wanted, drawn = torch.randn(4), []
    torch.manual_seed(1)
    with OwnRandomness(7):
        thread = threading.Thread(target=lambda: drawn.append((torch.randn(4), generator(CPU))))
        thread.start()
        thread.join()
        outer = generator(CPU).get_state()
        with OwnRandomness(8):
            inner = torch.randn(4)
        assert torch.equal(generator(CPU).get_state(), outer)
    assert torch.equal(drawn[0][0], wanted) and drawn[0][1] is torch.default_generator
    assert torch.equal(inner, torch.randn(4, generator=torch.Generator().manual_seed(8)))


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_keeps_a_share_and_the_mean(device):
    x = torch.ones(400, 500, device=device, requires_grad=True)
    with OwnRandomness():
        y = nn.functional.dropout(x, 0.2)
        assert torch.equal(nn.functional.dropout(x, 0.2, training=False), x)
    y.sum().backward()
    kept = y > 0
    assert abs(kept.float().mean().item() - 0.8) < 5 * (0.8 * 0.2 / x.numel()) ** 0.5
    torch.testing.assert_close(y, kept * 1.25)
    torch.testing.assert_close(x.grad, kept * 1.25)


def test_a_model_is_built_without_the_processs_generator():
    torch.manual_seed(CONFIG.seed)
    wanted = build_model(CONFIG, 32)
    before = torch.get_rng_state()
    model, _ = prepare_model(CONFIG, 32)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
