import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, people

from viewdiff_nb.drop_in import DropIn, choose_ways, own_threshold, rates_at
from viewdiff_nb.metrics import yaw_bin
from viewdiff_nb.modules.adjusted import Adjusted
from viewdiff_nb.modules.baselines import Frontaliser, MeanFace, PoseRidge, RawEmbedding, enrolled

RAW = (0.0, "none")
FAR = 0.01
STEPS = (0.25, 0.5, 1.0)


class Noise(Frontaliser):
    """The same noise for the same embedding; nobody is recognised by it."""

    def predict(self, unit, angles, keypoints_3d, pose_error=None):
        return torch.sin(1e4 * unit)


class Opposite(Frontaliser):
    def predict(self, unit, angles, keypoints_3d, pose_error=None):
        return -unit


class Clairvoyant(Frontaliser):
    """Knows the front of every view; angles' pitch is the number of the person."""

    def __init__(self, front):
        super().__init__()
        self.front = front

    def predict(self, unit, angles, keypoints_3d, pose_error=None):
        return self.front[angles[:, 0].round().long()]


@pytest.fixture(scope="module")
def train():
    return people(60, views=10, noise=0.6)


@pytest.fixture(scope="module")
def val():
    """Nobody of train; raw views are recognised less well the larger the yaw."""
    return people(30, views=20, noise=0.6, first=1000)


def ways_of(model, faces):
    """Every step and centring of a model, fitted to faces."""
    given = faces.src, faces.angles, faces.keypoints_3d, faces.front
    found = {(0.0, centring): Adjusted(None, *given, step=0.0, centring=centring) for centring in ("none", "even")}
    return found | {(s, c): Adjusted(model, *given, step=s, centring=c) for s in STEPS for c in ("none", "even")}


def chosen(ways, faces, far=FAR):
    return choose_ways(ways, faces.src, faces.angles, faces.keypoints_3d, faces.front, faces.person, far=far)


def seen(model, faces):
    return model(F.normalize(faces.src, dim=1), **faces.conditions(), return_residual=False)


def brute_rates(threshold, predicted, faces):
    """TAR, FAR, rank-1 of each bin, one comparison after the other."""
    a, b = (F.normalize(x, dim=1).numpy() for x in (predicted, faces.front))
    edges = ((0, 30), (30, 45), (45, 60), (60, 75), (75, 91))
    rates = []
    for low, high in edges:
        right, wrong, first = [], [], []
        for i in ((faces.abs_yaw >= low) & (faces.abs_yaw < high)).nonzero()[:, 0].tolist():
            own = int(faces.person[i])
            cosines = [float(a[i] @ front) for front in b]
            right.append(cosines[own] >= threshold)
            others = cosines[:own] + cosines[own + 1 :]
            wrong += [cosine >= threshold for cosine in others]
            first.append(all(cosines[own] > other for other in others))
        rates.append([np.mean(x) if x else np.nan for x in (right, wrong, first)])
    return np.array(rates)


def test_rates_by_brute_force(val):
    some = val.where(yaw_bin(val.abs_yaw) != 2)
    predicted = 3 * some.src
    found = rates_at(0.2, predicted, some.front, some.person, yaw_bin(some.abs_yaw))
    expected = brute_rates(0.2, predicted, some)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert np.isnan(expected[2]).all() and (expected[[0, 4]] > 0).all() and expected[4, 0] < expected[0, 0]


def test_a_tie_is_a_miss_and_the_threshold_itself_is_accepted():
    front, bins = torch.eye(3), torch.zeros(2, dtype=torch.long)
    predicted = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    first, *empty = rates_at(1.0, predicted, front, torch.tensor([0, 2]), bins)
    assert first == (0.5, 0.0, 0.5) and np.isnan(empty).all()  # 1 / sqrt(2) with two of them; 1 with the right one
    assert rates_at(0.0, predicted, front, torch.tensor([0, 2]), bins)[0] == (1.0, 1.0, 0.5)


def test_the_own_threshold_by_brute_force(val):
    near = val.where(val.abs_yaw < 30)
    cosines = F.normalize(near.src, dim=1).double() @ F.normalize(val.front, dim=1).double().T
    own = F.one_hot(near.person, 30).bool()
    for far in (0.01, 0.05, 0.3):
        found = own_threshold(F.normalize(val.src, dim=1), val.front, val.person, val.angles, far)
        fits = [t for t in cosines[own].tolist() if (cosines[~own] >= t - 1e-7).double().mean() <= far]
        assert found == pytest.approx(min(fits), abs=1e-6)


def test_a_recogniser_whose_impostors_are_all_closer_accepts_nobody():
    """Own views are opposite to their fronts, so the highest genuine cosine accepts every impostor."""
    front = torch.eye(4)
    found = own_threshold(-front, front, torch.arange(4), torch.zeros(4, 3), far=0.25)
    assert found == float("inf")


def test_too_few_near_views_to_state_the_rate():
    faces = people(10, views=12)  # of which 4 each are below 30 degrees: 40 views, 9 impostors each
    assert own_threshold(faces.src, faces.front, faces.person, faces.angles, far=1 / 360) < 1
    words = r"40 views below 30° of 10 people make 360 impostor pairs; a false accept rate of 0.0025 needs 400 or more"
    with pytest.raises(ValueError, match=words):
        own_threshold(faces.src, faces.front, faces.person, faces.angles, far=0.0025)


MODELS = {
    "ridge": lambda train: PoseRidge(train.src, train.angles, train.target, 300.0, residual=True),
    "weak ridge": lambda train: PoseRidge(train.src, train.angles, train.target, 0.1),
    "noise": lambda train: Noise(),
    "one vector": lambda train: MeanFace(train.front),
    "somebody of validation": lambda train: MeanFace(people(30, views=1, first=1000).front[3:4]),
    "opposite": lambda train: Opposite(),
    "random linear": lambda train: RandomLinear(0),
    "another random linear": lambda train: RandomLinear(1),
}


class RandomLinear(Frontaliser):
    def __init__(self, seed):
        super().__init__()
        self.weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)) / 6

    def predict(self, unit, angles, keypoints_3d, pose_error=None):
        return unit + unit @ self.weight * angles[:, 1:2].sin()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("far", [0.004, 0.05])
def test_on_validation_people_no_bin_is_worse_than_raw(train, val, name, far):
    model = chosen(ways_of(MODELS[name](train), train), val, far)
    threshold = own_threshold(F.normalize(val.src, dim=1), val.front, val.person, val.angles, far)
    raw, found = (brute_rates(threshold - 1e-6, x, val) for x in (val.src, seen(model, val)))
    slack = 1e-9
    assert (found[:, 0] >= raw[:, 0] - slack).all() and (found[:, 2] >= raw[:, 2] - slack).all()
    assert (found[:, 1] <= np.maximum(far, raw[:, 1]) + slack).all()


@pytest.mark.parametrize("name", ["noise", "opposite", "one vector"])
def test_a_harmful_model_is_left_alone(train, val, name):
    """At full length; only centring, which needs no model, may help."""
    given = train.src, train.angles, train.keypoints_3d, train.front
    model = MODELS[name](train)
    ways = {
        RAW: Adjusted(None, *given, step=0.0, centring="none"),
        (1.0, "none"): Adjusted(model, *given, centring="none"),
    }
    found = chosen(ways, val)
    assert found.ways == (RAW,) * 5
    torch.testing.assert_close(seen(found, val), F.normalize(val.src, dim=1))


@pytest.fixture(scope="module")
def knowing(val):
    """Validation people whose pitch is their number, and whose near-frontal views are their fronts."""
    angles, src, near = val.angles.clone(), val.src.clone(), val.abs_yaw < 30
    angles[:, 0], src[near] = val.person.float(), val.target[near]
    return replace(val, angles=angles, src=src)


def test_a_perfect_model_is_followed_where_it_helps(knowing):
    """No further than it takes; where raw is perfect, too, not at all."""
    found = chosen(ways_of(Clairvoyant(knowing.front), knowing), knowing)
    assert found.ways[0] == RAW and all(step > 0 for step, _ in found.ways[2:])
    threshold = own_threshold(knowing.src, knowing.front, knowing.person, knowing.angles, FAR)
    assert (brute_rates(threshold - 1e-6, seen(found, knowing), knowing)[:, [0, 2]] == 1).all()


class Flattering(Clairvoyant):
    """Somebody in the middle of all, to whom everybody is similar, with some of the right person."""

    def predict(self, unit, angles, keypoints_3d, pose_error=None):
        own = super().predict(unit, angles, keypoints_3d)
        return F.normalize(self.front.mean(0), dim=0) + 0.6 * own


@pytest.mark.parametrize("far", [0.05, 0.2])
def test_more_of_the_right_people_are_not_bought_with_wrong_ones(val, far):
    """At full length everybody is accepted and is first; of what the rate of wrong ones allows the best is taken."""
    front, src = (F.normalize(x + 0.17, dim=1) for x in (val.front, val.src))  # all have a part in common
    angles = val.angles.clone()
    angles[:, 0] = val.person.float()
    faces = replace(val, front=front, src=src, angles=angles)
    given = faces.src, faces.angles, faces.keypoints_3d, faces.front
    flattering = Flattering(front)
    steps = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 1.0)
    ways = {(step, "none"): Adjusted(flattering, *given, step=step, centring="none") for step in steps}
    threshold = own_threshold(src, front, faces.person, angles, far)
    whole = brute_rates(threshold, seen(flattering, faces), faces)
    assert (whole[:, 0] == 1).all() and (whole[:, 2] == 1).all() and (whole[:, 1] > 2 * far).all()
    model = chosen(ways, faces, far)
    raw, *rates = (brute_rates(threshold - 1e-6, x, faces) for x in (src, *(seen(way, faces) for way in ways.values())))
    for i, way in enumerate(model.ways):
        fits = [r[i, 0] for r in rates if r[i, 1] <= max(far, raw[i, 1]) and (r[i, [0, 2]] >= raw[i, [0, 2]]).all()]
        found = rates[list(ways).index(way)][i]
        assert found[1] <= max(far, raw[i, 1]) and found[0] == max(fits)
        assert found[0] < 1 or i == 0  # more would be accepted with more wrong ones
    assert any(step > 0 for step, _ in model.ways)


def test_a_bin_without_views_stays_raw(knowing):
    ways = ways_of(Clairvoyant(knowing.front), knowing)
    some = knowing.where(~torch.isin(yaw_bin(knowing.abs_yaw), torch.tensor([2, 4])))
    found = chosen(ways, some).ways
    assert found[2] == found[4] == RAW and found[3] == chosen(ways, knowing).ways[3] != RAW


def test_each_bin_goes_its_own_way(train, val):
    """By what each Adjusted predicts, back among the fronts."""
    ways = ways_of(MODELS["ridge"](train), train)
    order = (RAW, (0.25, "even"), (0.0, "even"), (1.0, "none"), (0.25, "even"))
    found = seen(DropIn.of(ways, order), val)
    mean = F.normalize(train.front, dim=1).mean(0)
    for i, (low, way) in enumerate(zip((0, 30, 45, 60, 75), order, strict=True)):
        rows = ((val.abs_yaw >= low) & (val.abs_yaw < (30, 45, 60, 75, 91)[i])).nonzero()[:, 0]
        alone = seen(ways[way], val)[rows] + (mean if way[1] == "even" else 0)
        assert len(rows) > 20
        torch.testing.assert_close(found[rows], alone / alone.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)


def test_pose_errors_reach_their_views(train, val):
    class Told(RawEmbedding):
        def predict(self, unit, angles, keypoints_3d, pose_error=None):
            torch.testing.assert_close(pose_error[:, 1], 2 * angles[:, 1])
            return -unit

    given = train.src, train.angles, train.keypoints_3d, train.front
    told = (1.0, "none")
    ways = {RAW: Adjusted(None, *given, step=0.0, centring="none"), told: Adjusted(Told(), *given, centring="none")}
    model = DropIn.of(ways, [RAW, told, told, RAW, told])
    found = model(val.src, val.angles, val.keypoints_3d, return_residual=False, pose_error=2 * val.angles)
    is_told = torch.isin(yaw_bin(val.abs_yaw), torch.tensor([1, 2, 4]))
    torch.testing.assert_close(found, torch.where(is_told[:, None], -val.src, val.src))


def test_the_gallery_stays_raw(train, val):
    model = DropIn.of(ways_of(MODELS["ridge"](train), train), [(1.0, "even")] * 5)
    torch.testing.assert_close(enrolled(model, 3 * val.front), F.normalize(val.front, dim=1))


@pytest.mark.parametrize("device", DEVICES)
def test_it_moves_and_is_saved_with_its_parts(train, val, device):
    ridge = MODELS["ridge"](train)
    order = [RAW, (0.5, "even"), (0.5, "even"), (1.0, "none"), (1.0, "even")]
    model = DropIn.of(ways_of(ridge, train), order)
    expected, state = seen(model, val), copy.deepcopy(model.state_dict())
    another = people(20, views=8, first=50)
    other = DropIn.of(ways_of(PoseRidge(another.src, another.angles, another.target, residual=True), another), order)
    assert not torch.allclose(seen(other, val), expected, atol=1e-2)
    other.load_state_dict(state)
    torch.testing.assert_close(seen(other.to(device), val.to(device)).cpu(), expected, atol=1e-5, rtol=0)
    assert {tensor.device.type for tensor in other.state_dict().values()} == {device}
    double = copy.deepcopy(model).double()
    wide = double(val.src.double(), val.angles.double(), val.keypoints_3d.double(), return_residual=False)
    torch.testing.assert_close(wide.float(), expected, atol=1e-5, rtol=0)


def test_ways_that_are_not_there(train):
    ways = {RAW: ways_of(None, train)[RAW]}
    for order in ([RAW] * 4, [RAW] * 4 + [(0.5, "even")]):
        with pytest.raises(ValueError, match=r"ways must name one of \[\(0.0, 'none'\)\] for each of 5 bins, got"):
            DropIn.of(ways, order)


def test_raw_must_be_among_the_ways():
    with pytest.raises(ValueError, match="must have the way .*the raw embedding; it has"):
        choose_ways({}, *(torch.zeros(0) for _ in range(5)))


def test_what_does_not_go_together_is_refused():
    quarter = [RAW] * 2 + [(0.25, "none")] * 3
    for ways, options, words in (
        (quarter[:4], {}, "a way for each of 5 bins"),
        (quarter, {}, "there is no model"),
        ([RAW] * 4 + [(0.0, "even")], {}, "no shift is given"),
    ):
        with pytest.raises(ValueError, match=words):
            DropIn(None, ways, **options)
    DropIn(Opposite(), quarter)


def test_two_models_have_no_common_prediction(train):
    given = train.src, train.angles, train.keypoints_3d, train.front
    ways = {(step, "none"): Adjusted(Opposite(), *given, step=step, centring="none") for step in (0.25, 0.5)}
    with pytest.raises(ValueError, match="toward one model's predictions, got 2 models"):
        DropIn.of(ways, [(0.25, "none")] * 2 + [(0.5, "none")] * 3)


def test_without_a_shift_bins_stay_raw_or_are_moved(train, val):
    ways = [RAW, (0.5, "none"), RAW, RAW, RAW]
    found = DropIn(MODELS["ridge"](train), ways).predict(
        unit := F.normalize(val.src, dim=1), val.angles, val.keypoints_3d
    )
    raw = yaw_bin(val.abs_yaw) != 1
    torch.testing.assert_close(found[raw], unit[raw], atol=1e-6, rtol=0)
    assert not torch.allclose(found[~raw], unit[~raw], atol=0.01)
