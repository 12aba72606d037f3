import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from viewdiff_nb.metrics import rank1, recognition_by_yaw, roc_auc, similarity_scores, threshold_at_far


def random_scores(people=30, views=4):
    gallery = torch.randn(people, 16)
    person = torch.arange(people).repeat_interleave(views)
    return similarity_scores(gallery[person] + 1.5 * torch.randn(len(person), 16), gallery, person), person


def test_hand_made_case():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    probes = torch.tensor([[2.0, 0.2], [5.0, 1.0], [-1.0, 0.1]])  # persons 0, 1 (mistaken for 0), 2
    scores = similarity_scores(probes, gallery, torch.tensor([0, 1, 2]))
    assert rank1(scores).tolist() == [True, False, True]
    torch.testing.assert_close(scores.genuine[1], torch.tensor(1 / 26**0.5))
    assert scores.impostor.shape == (3, 2)
    # genuine .995, .196, .995 against impostor .0995, -.995, .981, -.981, -.995, .0995: 6 + 5 + 6 of 18 pairs
    assert roc_auc(scores) == pytest.approx(17 / 18)


def test_agrees_with_scikit_learn():
    scores, _ = random_scores()
    truth = torch.cat((torch.ones(len(scores.genuine)), torch.zeros(scores.impostor.numel())))
    values = torch.cat((scores.genuine, scores.impostor.flatten()))
    assert roc_auc(scores) == pytest.approx(roc_auc_score(truth, values), abs=1e-9)
    far, tar, _ = roc_curve(truth, values, drop_intermediate=False)
    for wanted in (0.01, 0.1):
        threshold = threshold_at_far(scores.impostor, wanted)
        got = (scores.genuine > threshold).float().mean().item()
        assert got == pytest.approx(tar[far <= wanted].max(), abs=1e-6)
        assert (scores.impostor > threshold).float().mean() <= wanted


def test_ties_are_not_recognised():
    scores = similarity_scores(torch.ones(4, 3), torch.ones(2, 3), torch.tensor([0, 1, 0, 1]))
    assert not rank1(scores).any()
    assert roc_auc(scores) == 0.5
    assert threshold_at_far(scores.impostor, 0.5) >= scores.genuine.max()  # nobody is accepted


def test_the_mean_face_has_a_cosine_but_recognises_nobody():
    gallery = torch.randn(200, 64) + 2.0
    person = torch.arange(200).repeat_interleave(5)
    mean = torch.nn.functional.normalize(gallery, dim=1).mean(0).expand(1000, -1)
    rates = recognition_by_yaw(mean, gallery, person, torch.rand(1000) * 90, far=0.01)["all"]
    assert rates["cosine"] > 0.8 and rates["rank1"] < 0.02 and abs(rates["centred_cosine"]) < 0.05


def test_bins_partition_the_views_and_share_one_threshold():
    gallery = torch.randn(20, 8)
    person = torch.arange(20).repeat_interleave(10)
    yaw = torch.linspace(0, 90, 200)
    table = recognition_by_yaw(gallery[person] + torch.randn(200, 8), gallery, person, yaw, far=0.01)
    fine = [table[f"{a}-{b}"] for a, b in ((0, 30), (30, 45), (45, 60), (60, 75), (75, 90))]
    assert sum(row["views"] for row in fine) == 200 == table["0-45"]["views"] + table["45-90"]["views"]
    for rate in ("rank1", "tar", "cosine", "mse", "centred_cosine"):
        assert sum(row[rate] * row["views"] for row in fine) / 200 == pytest.approx(table["all"][rate], abs=1e-5)


def test_mse_is_that_of_unit_embeddings():
    gallery = torch.randn(3, 8)
    rates = recognition_by_yaw(5 * gallery, gallery, torch.arange(3), torch.zeros(3), far=0.2)["all"]
    assert rates["mse"] == pytest.approx(0, abs=1e-12) and rates["cosine"] == pytest.approx(1)


@pytest.mark.parametrize("predicted,gallery,message", [
    (torch.ones(2, 4), torch.ones(1, 4), "at least 2 people, got 1"),
    (torch.ones(0, 4), torch.ones(3, 4), "no probe"),
    (torch.full((2, 4), torch.nan), torch.ones(3, 4), "finite"),
])  # fmt: skip
def test_refuses_nonsense(predicted, gallery, message):
    with pytest.raises(ValueError, match=message):
        similarity_scores(predicted, gallery, torch.zeros(len(predicted), dtype=torch.long))


def test_refuses_a_far_below_the_resolution():
    with pytest.raises(ValueError, match="cannot be told from 500 impostor scores"):
        threshold_at_far(torch.rand(500), 1e-3)
