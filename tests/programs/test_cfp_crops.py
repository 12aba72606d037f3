import cfp_crops
import torch
from conftest import people

from viewdiff_nb.faces.crops import PROFILE_CROPS, parse_crop
from viewdiff_nb.studies.real_benchmark import stand_in


def test_candidates_are_named_by_their_crops():
    found = cfp_crops.candidates()
    assert found["five@1.12 + three@1.12"] == PROFILE_CROPS and len(found) == 15
    assert all(parse_crop(crop) for crops in found.values() for crop in crops)


def test_fewest_crops_within_a_standard_error_and_of_those_the_best():
    crops = {"one": ("a",), "poor": ("b",), "two": ("a", "b"), "other two": ("a", "c"), "four": ("a", "b", "c", "d")}
    spread = torch.linspace(-0.01, 0.01, 10)  # standard error .002 over ten folds
    auc = {
        "one": 0.970 + spread,
        "poor": 0.90 + spread,
        "two": 0.979 + spread,
        "other two": 0.9795 + spread,
        "four": 0.980 + spread,
    }
    assert cfp_crops.choose(auc, crops, torch.arange(10)) == "other two"
    assert cfp_crops.choose(auc | {"one": 0.9785 + spread}, crops, torch.arange(10)) == "one"


def test_sums_of_crops_replace_the_profiles_and_leave_the_fronts():
    benchmark = stand_in(people(20, views=12))
    unit = torch.nn.functional.normalize(benchmark.faces.src, dim=1)
    one, other = (torch.nn.functional.normalize(torch.randn(30, 32), dim=1) for _ in range(2))
    both = cfp_crops.summed(benchmark, {"a": one, "b": other}, ("a", "b"))
    torch.testing.assert_close(both[:-30], unit[:-30])
    torch.testing.assert_close(both[-30:], torch.nn.functional.normalize(one + other, dim=1))
