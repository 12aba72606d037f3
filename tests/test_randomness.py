import threading

import pytest
import torch
from conftest import CONFIG, DEVICES
from torch import nn

from viewdiff_nb.modules.baselines import MLP
from viewdiff_nb.training.checkpoint import build_model, prepare_model
from viewdiff_nb.training.devices import OwnRandomness, generator, manual_seed

CPU = torch.device("cpu")
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
