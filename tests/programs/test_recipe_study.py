import pytest
import recipe_study as study
import torch
from conftest import people
from mirror import mirrored
from studies_fixture import TINY, small_split

from viewdiff_nb.modules.baselines import RawEmbedding
from viewdiff_nb.studies.store import Store


def test_every_recipe_and_model_runs_and_is_tabled(tmp_path):
    split = small_split()
    results = study.recipe_study(TINY, split, seeds=[0, 1], workers=1, store=Store(split, tmp_path))
    flipped = {name + study.FLIP for name in (study.RECIPE, *study.MODELS) if "LoRA" in name or name == study.RECIPE}
    assert {name for name, _ in results} == {*study.RECIPES, *study.MODELS, *flipped}
    assert not any("test" in result for result in results.values())  # test people are for the end
    table = study.recipe_table(results)
    assert table.loc[study.RECIPE, "rank-1 against the recipe"] == "+0.000 ± 0.000"
    trained = {table.loc[name, "TAR all"] for name in study.RECIPES}
    assert len(trained) > len(study.RECIPES) / 2  # the recipes differ
    study.write_table(results, tmp_path, "note")
    assert (tmp_path / "recipe_val.csv").is_file() and (tmp_path / "recipe_val.png").is_file()


def test_mirrored_people_are_people_of_their_own():
    faces = people(5)
    both = study.with_mirrored(faces)
    assert len(both) == 2 * len(faces) and len(set(both.names)) == 10
    torch.testing.assert_close(both.target[len(faces) :], mirrored(faces).target)
    assert both.person[len(faces) :].min() == 5


def test_the_gate_scales_the_residual_by_pose_only():
    class Constant(RawEmbedding):
        def predict(self, unit, angles, keypoints_3d):
            return unit + 1

    gated, faces = study.YawGated(Constant()), people(4)
    with torch.no_grad():
        residual = gated(faces.src, **faces.conditions())
        frontal = gated(faces.src, **faces.conditions(), return_residual=False)
    share = residual / faces.src.norm(dim=1, keepdim=True)
    assert (share > 0).all() and (share < 1).all()
    torch.testing.assert_close(share, share[:, :1].expand_as(share))
    torch.testing.assert_close(frontal, faces.src + residual)
    assert share[:, 0].std() > 0
    with pytest.raises(RuntimeError):
        gated(faces.src[:3], **faces.conditions())
