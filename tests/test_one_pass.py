from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, DEVICES, run, sets
from torch import nn

from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.one_pass import MAY_DIFFER, StackedAdamW, refusal, shared_part, train_together

LOSS = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("rates", [[1e-3, 1e-1], [1e-2, 1e-2]])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_stacked_adamw_is_adamw_row_by_row(weight_decay, rates):
    start = [torch.randn(2, 3, 4), torch.randn(2, 5)]
    stacks = [nn.Parameter(x.clone()) for x in start]
    optimiser = StackedAdamW(stacks, torch.tensor(rates), weight_decay, clip_norm=1.0)
    rows = [[nn.Parameter(x[i].clone()) for x in start] for i in range(2)]
    references = [
        torch.optim.AdamW(row, lr=rate, weight_decay=weight_decay) for row, rate in zip(rows, rates, strict=True)
    ]
    for step in range(20):
        gradients = [torch.randn_like(x) * (10 if step % 2 else 0.1) for x in start]
        factor = 1 / (step + 1)
        for parameter, gradient in zip(stacks, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimiser.begin(factor)
        optimiser.step(LOSS)
        for i, (row, reference, rate) in enumerate(zip(rows, references, rates, strict=True)):
            for parameter, gradient in zip(row, gradients, strict=True):
                parameter.grad = gradient[i].clone()
            nn.utils.clip_grad_norm_(row, 1.0)
            reference.param_groups[0]["lr"] = rate * factor
            reference.step()
            for parameter, stack in zip(row, stacks, strict=True):
                torch.testing.assert_close(stack[i], parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("rates", [[0.1, 0.2], [0.1, 0.1]])
def test_a_row_that_diverged_stays_where_it_was_to_the_bit(rates, where, bad):
    """Momentum and weight decay would go on moving it; the other row is as in a run without it."""
    torch.manual_seed(0)
    start, gradients = (
        [torch.randn(2, 3), torch.randn(2, 2, 4)],
        [[torch.randn(2, 3), torch.randn(2, 2, 4)] for _ in range(9)],
    )

    def steps(diverges: bool) -> list[list[torch.Tensor]]:
        stacks = [nn.Parameter(x.clone()) for x in start]
        optimiser = StackedAdamW(stacks, torch.tensor(rates), weight_decay=0.1, clip_norm=1.0)
        seen = []
        for i, both in enumerate(gradients):
            loss = LOSS.clone()
            for stack, gradient in zip(stacks, both, strict=True):
                stack.grad = gradient.clone()
            if diverges and i == 4:
                (loss if where == "loss" else stacks[0].grad[:, 1])[1] = bad
            optimiser.begin(1.0)
            optimiser.step(loss)
            assert optimiser.diverged.tolist() == [False, diverges and i >= 4]
            seen.append([x.detach().clone() for x in (*stacks, optimiser.mean, optimiser.square)])
        return seen

    alone, seen = steps(False), steps(True)
    for i in range(9):
        assert all(torch.equal(one[0], other[0]) for one, other in zip(seen[i], alone[i], strict=True))
        assert all(torch.equal(one[1], other[1]) for one, other in zip(seen[i], alone[min(i, 3)], strict=True))
    assert not torch.equal(alone[8][0][1], alone[3][0][1])


EXACT = replace(CONFIG, use_lora_attention=True, dropout=0.0, min_yaw=45.0, epochs=7)  # 7 x 8 batches


def cells(base_path: str, **changes) -> list[TrainConfig]:
    config = replace(EXACT, base_model_path=base_path, **changes)
    return [
        replace(config, rank=2, lora_alpha=2.0, seed=3),
        replace(config, rank=8, lora_alpha=4.0, lora_lr=5e-3),
        replace(config, rank=4, lora_alpha=4.0, seed=1, lambda_prior=1.0),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_projection_layer": True, "mixup": True},
        {"use_prior_preservation": True, "loss": "identity"},
        {
            "use_prior_preservation": True,
            "mixup": True,
            "use_projection_layer": True,
            "weight_decay": 0.5,
            "lora_targets": ("attention", "feed_forward"),
        },
    ],
    ids=str,
)
def test_adapters_are_those_of_separate_runs(base_path, changes, device):
    configs = cells(base_path, device=device, **changes)
    for config, result in zip(configs, train_together(configs, *sets()), strict=True):
        alone = run(config)
        assert alone.steps == result.steps >= 50 and result.stopped == "finished"
        for (name, value), other in zip(
            result.model.state_dict().items(), alone.model.state_dict().values(), strict=True
        ):
            assert (value - other).abs().max() <= 1e-4, name
        assert result.history["train_loss"].tolist() == pytest.approx(
            alone.history["train_loss"].tolist(), rel=1e-4, nan_ok=True
        )
        assert result.history["val_rank1"].iloc[-1] == pytest.approx(alone.history["val_rank1"].iloc[-1], abs=0.02)


@pytest.mark.parametrize("mixup", [False, True])
def test_mixed_precision_trains_to_about_the_same(base_path, mixup):
    whole, mixed = (train_together(cells(base_path, use_amp=amp, mixup=mixup), *sets()) for amp in (False, True))
    for a, b in zip(whole, mixed, strict=True):
        assert b.history["train_loss"].iloc[-1] == pytest.approx(a.history["train_loss"].iloc[-1], rel=0.05)


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 1e30, "lora_lr": 1e-3}, {"lora_lr": 1e20}], ids=["at once", "later"]
)
def test_one_diverged_run_stays_where_it_was_and_does_not_disturb_the_others(base_path, changes, monkeypatch):
    configs = cells(base_path, loss="mse", weight_decay=0.5)
    undisturbed = train_together(configs, *sets())
    configs[1] = replace(configs[1], **changes)
    steps: list[list[torch.Tensor]] = []
    step = StackedAdamW.step

    def recorded(self, loss):
        before = [p.detach()[1].clone() for p in self.parameters]
        step(self, loss)
        if self.diverged[1]:
            steps.append(before)

    monkeypatch.setattr(StackedAdamW, "step", recorded)
    results = train_together(configs, *sets())
    assert [r.stopped for r in results] == ["finished", "diverged", "finished"]
    for i in (0, 2):
        for a, b in zip(undisturbed[i].model.parameters(), results[i].model.parameters(), strict=True):
            assert torch.equal(a, b)
    first, *_, last = steps  # before the step that had no finite gradient, and before the last one
    assert len(steps) > 50 and all(map(torch.equal, first, last))
    assert all(p.isfinite().all() for p in results[1].model.parameters())


def test_what_is_shared(base_path):
    first, second, _ = cells(base_path)
    assert shared_part(first) == shared_part(second) != shared_part(replace(first, voxel_resolution=9))
    assert set(MAY_DIFFER) == {"rank", "lora_alpha", "lora_lr", "lambda_prior", "seed"}
    with pytest.raises(ValueError, match="may differ only in rank, lora_alpha"):
        train_together([first, replace(second, epochs=9)], *sets())


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"use_lora_attention": False}, "only LoRA adapters of a frozen base"),
        ({"freeze_base": False}, "only LoRA adapters"),
        ({"use_cross_view": True, "n_views": 4}, "groups of views"),
        ({"gradient_accumulation_steps": 2}, "accumulation"),
        ({"save_dir": "x"}, "checkpoints"),
        ({"devices": 2}, "several devices"),
    ],
)
def test_what_is_trained_alone(base_path, changes, reason):
    config = replace(cells(base_path)[0], **changes)
    assert reason in refusal(config)
    with pytest.raises(ValueError, match=reason):
        train_together([config], *sets())
