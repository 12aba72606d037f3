import torch
from torch import nn

from viewdiff_nb.modules.lora import evaluation_mode
from viewdiff_nb.modules.prior import teacher_outputs


def test_every_module_is_in_its_own_mode_again():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).train()
    model[1].eval()  # frozen statistics
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
    assert [module.training for module in model] == [True, False, True] and model.training


def test_a_teachers_too():
    class Teacher(nn.Sequential):
        def forward(self, src, return_residual=True):
            return super().forward(src)

    teacher = Teacher(nn.BatchNorm1d(3), nn.Linear(3, 3)).train()
    teacher[0].eval()
    assert not teacher_outputs(teacher, torch.randn(4, 3), {}).requires_grad
    assert [module.training for module in teacher] == [False, True]
