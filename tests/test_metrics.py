import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from viewdiff_nb import metrics
from viewdiff_nb.metrics import (
    equal_error_rate,
    fold_hits,
    pair_counts,
    recognition_by_yaw,
    roc_auc,
    similarity_scores,
    tar_at_far,
    tar_name,
    verification_hits,
)


def random_people(people=30, views=4, noise=1.5, width=16):
    gallery = torch.randn(people, width)
    person = torch.arange(people).repeat_interleave(views)
    return gallery[person] + noise * torch.randn(len(person), width), gallery, person


def one(rate, scores, *more):
    return rate(scores.genuine_counts[0], scores.impostor_counts[0], *more).item()


def pairs_of(predicted, gallery, person):
    """All scores and whether they are genuine, by a plain matrix product."""
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (predicted, gallery)]
    similarity = unit[0] @ unit[1].T
    truth = torch.nn.functional.one_hot(person, len(gallery))
    return truth.flatten().numpy(), similarity.flatten().numpy(), similarity


def test_hand_made_case():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    probes = torch.tensor([[2.0, 0.2], [5.0, 1.0], [-1.0, 0.1]])  # persons 0, 1 (mistaken for 0), 2
    scores = similarity_scores(probes, gallery, torch.tensor([0, 1, 2]))
    assert scores.rank.tolist() == [1, 2, 1]
    assert [(scores.rank <= k).float().mean().item() for k in (1, 2)] == [pytest.approx(2 / 3), 1.0]
    torch.testing.assert_close(scores.genuine[1], torch.tensor(1 / 26**0.5))
    # genuine .995, .196, .995 against impostor .0995, -.995, .981, -.981, -.995, .0995: 6 + 5 + 6 of 18 pairs
    assert one(roc_auc, scores) == pytest.approx(17 / 18)
    # one of six impostors lies above .196 and none above .995
    assert one(tar_at_far, scores, 0.17) == 1.0 and one(tar_at_far, scores, 0.1667) == 1.0
    assert one(equal_error_rate, scores) == pytest.approx(
        1 / 6
    )  # accept from .196 on: 1 of 6 impostors, no genuine lost


@pytest.mark.parametrize("noise", [0.5, 1.5, 4.0])
def test_agrees_with_scikit_learn(noise):
    people = random_people(noise=noise)
    scores = similarity_scores(*people)
    truth, values, similarity = pairs_of(*people)
    assert one(roc_auc, scores) == pytest.approx(roc_auc_score(truth, values), abs=1e-6)
    far, tar, _ = roc_curve(truth, values, drop_intermediate=False)
    for wanted in (0.001, 0.01, 0.1):
        assert one(tar_at_far, scores, wanted) == pytest.approx(tar[far <= wanted].max(), abs=1e-6)
    assert one(equal_error_rate, scores) == pytest.approx(np.maximum(far, 1 - tar).min(), abs=1e-6)
    order = similarity.argsort(1, descending=True)
    for k in (1, 3):
        found = (order[:, :k] == people[2][:, None]).any(1).float().mean().item()
        assert (scores.rank <= k).float().mean().item() == pytest.approx(found)


def test_a_large_gallery_is_counted_in_pieces(monkeypatch):
    people = random_people()
    whole = similarity_scores(*people)
    monkeypatch.setattr(metrics, "PIECE", 70)  # two probes at a time
    pieces = similarity_scores(*people)
    assert torch.equal(whole.rank, pieces.rank)
    assert torch.equal(whole.genuine_counts, pieces.genuine_counts)
    # another shape of the product may change a similarity's last bit, and with it one cell
    assert (whole.impostor_counts - pieces.impostor_counts).abs().sum() <= 4


def test_groups_add_up():
    people = random_people()
    group = torch.arange(len(people[0])) % 3
    parts, whole = similarity_scores(*people, group, 3), similarity_scores(*people)
    assert torch.equal(parts.impostor_counts.sum(0), whole.impostor_counts[0])
    assert parts.genuine_counts.sum(1).tolist() == [40, 40, 40]
    alone = similarity_scores(people[0][group == 1], people[1], people[2][group == 1])
    assert roc_auc(parts.genuine_counts, parts.impostor_counts)[1] == pytest.approx(one(roc_auc, alone), abs=1e-6)


def test_ties_are_not_recognised_to_the_last_bit(monkeypatch):
    """Every front stands under two names: nobody is recognised, whatever the widths of vectors and pieces."""
    for width, people, piece in itertools.product((3, 17, 31, 129, 512), (5, 33, 100), (1, 1000, 2**22)):
        monkeypatch.setattr(metrics, "PIECE", piece)
        gallery = torch.randn(people, width).repeat(2, 1)
        person = torch.randint(2 * people, (150,))
        scores = similarity_scores(gallery[person] + torch.randn(150, width), gallery, person)
        assert (scores.rank > 1).all(), (width, people, piece)


@pytest.mark.parametrize("piece", [40, 2**22])
def test_ties_are_those_of_a_search_in_float64(piece, monkeypatch):
    """Some fronts and some probes stand there several times."""
    monkeypatch.setattr(metrics, "PIECE", piece)
    gallery = torch.randn(13, 37)[torch.randint(13, (20,))]
    person = torch.arange(20).repeat_interleave(6)
    predicted = (gallery[person] + 1.5 * torch.randn(120, 37))[torch.randint(60, (120,))]
    scores = similarity_scores(predicted, gallery, person)
    unit = [
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (predicted.double().numpy(), gallery.double().numpy())
    ]
    similarity = np.array([[(p * f).sum() for f in unit[1]] for p in unit[0]])  # equal pairs give equal sums
    own = similarity[np.arange(120), person]
    assert scores.rank.tolist() == (similarity >= own[:, None]).sum(1).tolist()
    truth = np.arange(20) == person.numpy()[:, None]
    assert one(roc_auc, scores) == pytest.approx(roc_auc_score(truth.ravel(), similarity.ravel()), abs=1e-9)
    far, tar, _ = roc_curve(truth.ravel(), similarity.ravel(), drop_intermediate=False)
    assert one(tar_at_far, scores, 0.01) == pytest.approx(tar[far <= 0.01].max(), abs=1e-9)


def test_one_answer_for_everybody_tells_nothing():
    """An impostor's similarity with a front is the genuine one, so each win has its loss."""
    gallery, person = torch.randn(33, 129), torch.arange(33).repeat_interleave(5)
    scores = similarity_scores(torch.randn(1, 129).expand(165, -1), gallery, person)
    assert one(roc_auc, scores) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("length", [1e-30, 1e-15, 1e25])
def test_the_length_of_an_embedding_does_not_matter(length):
    predicted, gallery, person = random_people()
    expected = similarity_scores(predicted, gallery, person)
    found = similarity_scores(length * predicted, gallery / length, person)
    assert torch.equal(found.rank, expected.rank)
    torch.testing.assert_close(found.genuine, expected.genuine)


def test_ties_of_all_are_misses():
    scores = similarity_scores(torch.ones(4, 3), torch.ones(2, 3), torch.tensor([0, 1, 0, 1]))
    assert (scores.rank > 1).all()
    assert one(roc_auc, scores) == 0.5
    assert one(tar_at_far, scores, 0.5) == 0  # nobody is accepted
    assert one(equal_error_rate, scores) == 1.0  # accept all or nobody


def ten_fold_accuracy(genuine, impostor, fold):
    """The procedure in words, with loops: every score as a threshold."""
    rates = []
    for i in range(10):
        mine, others = fold == i, fold != i
        levels = np.sort(genuine[others])
        right = [(genuine[others] >= t).sum() + (impostor[others] < t).sum() for t in levels]
        t = levels[int(np.argmax(right))]
        rates += list(((genuine[mine] >= t) + 1.0 * (impostor[mine] < t)) / 2)
    return float(np.mean(rates))


def test_verification_accuracy_is_that_of_ten_folds_by_person():
    predicted, gallery, person = random_people(people=40, views=6, noise=3.0)
    hits = verification_hits(predicted, gallery, person, seed=5)
    generator = torch.Generator().manual_seed(5)
    other = (person + torch.randint(1, 40, (240,), generator=generator)) % 40
    assert not (other == person).any()
    fold = (torch.randperm(40, generator=generator) % 10)[person]
    cosine = torch.nn.functional.cosine_similarity
    genuine, impostor = (cosine(predicted, gallery[who]).numpy() for who in (person, other))
    assert hits.mean().item() == pytest.approx(ten_fold_accuracy(genuine, impostor, fold.numpy()), abs=5e-3)
    assert 0.6 < hits.mean() < 0.99
    unrelated = verification_hits(torch.randn(240, 16), gallery, person).mean()
    assert 0.4 < unrelated < 0.6 and verification_hits(gallery[person], gallery, person).mean() > 0.97


def test_the_mean_face_has_a_cosine_but_recognises_nobody():
    gallery = torch.randn(200, 64) + 2.0
    person = torch.arange(200).repeat_interleave(5)
    mean = torch.nn.functional.normalize(gallery, dim=1).mean(0).expand(1000, -1)
    rates = recognition_by_yaw(mean, gallery, person, torch.rand(1000) * 90, fars=(0.01,))["all"]
    assert rates["cosine"] > 0.8 and rates["rank1"] < 0.02 and abs(rates["centred_cosine"]) < 0.05
    assert 0.4 < rates["accuracy"] < 0.6 and rates["eer"] > 0.4


def test_bins_partition_the_views_and_share_one_threshold():
    gallery = torch.randn(20, 8)
    person = torch.arange(20).repeat_interleave(10)
    yaw = torch.linspace(0, 90, 200)
    predicted = gallery[person] + torch.randn(200, 8)
    table = recognition_by_yaw(predicted, gallery, person, yaw, fars=(1e-3, 0.01))
    fine = [table[f"{a}-{b}"] for a, b in ((0, 30), (30, 45), (45, 60), (60, 75), (75, 90))]
    assert sum(row["views"] for row in fine) == 200 == table["0-45"]["views"] + table["45-90"]["views"]
    for rate in ("rank1", "rank5", "tar", "tar@1e-2", "cosine", "mse", "centred_cosine", "accuracy"):
        assert sum(row[rate] * row["views"] for row in fine) / 200 == pytest.approx(table["all"][rate], abs=1e-5)
    side = yaw >= 45
    scores = similarity_scores(predicted[side], gallery, person[side])
    assert table["45-90"]["auc"] == pytest.approx(one(roc_auc, scores), abs=1e-6)
    assert table["all"]["tar@1e-2"] == pytest.approx(
        one(tar_at_far, similarity_scores(predicted, gallery, person), 0.01)
    )


def test_mse_is_that_of_unit_embeddings():
    gallery = torch.randn(11, 8)
    rates = recognition_by_yaw(5 * gallery, gallery, torch.arange(11), torch.zeros(11), fars=(0.2,))["all"]
    assert rates["mse"] == pytest.approx(0, abs=1e-12) and rates["cosine"] == pytest.approx(1)


def test_names_of_true_accept_rates():
    assert [tar_name(far) for far in (1e-2, 1e-3, 1e-4)] == ["tar@1e-2", "tar", "tar@1e-4"]


@pytest.mark.parametrize(
    "predicted,gallery,message",
    [
        (torch.ones(2, 4), torch.ones(1, 4), "at least 2 people, got 1"),
        (torch.ones(0, 4), torch.ones(3, 4), "no probe"),
        (torch.full((2, 4), torch.nan), torch.ones(3, 4), "finite"),
    ],
)
def test_refuses_nonsense(predicted, gallery, message):
    person = torch.zeros(len(predicted), dtype=torch.long)
    for rate in (similarity_scores, verification_hits):
        with pytest.raises(ValueError, match=message):
            rate(predicted, gallery, person)


def test_a_far_below_the_resolution_is_not_told():
    people = random_people(people=11, views=5)  # 550 impostor pairs
    assert math.isnan(one(tar_at_far, similarity_scores(*people), 1e-3))
    assert 0 <= one(tar_at_far, similarity_scores(*people), 1 / 550) <= 1
    row = recognition_by_yaw(*people, torch.zeros(55), fars=(1e-2, 1e-3))["all"]
    assert [name for name, rate in row.items() if math.isnan(rate)] == ["tar"]
    for nonsense in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            one(tar_at_far, similarity_scores(*people), nonsense)


def test_twenty_people_with_six_views_get_a_full_report():
    people = random_people(people=20, views=6)  # 2,280 impostor pairs
    table = recognition_by_yaw(*people, torch.linspace(0, 89, 6).repeat(20), fars=(1e-2, 1e-3, 1e-4))
    for where, row in table.items():
        assert [name for name, rate in row.items() if math.isnan(rate)] == ["tar@1e-4"], where
        assert row["people"] == 20


def test_people_of_a_bin_are_those_whose_views_are_in_it():
    predicted, gallery, person = random_people(people=5, views=2)
    yaw = torch.tensor([10.0, 10] * 4 + [10.0, 80])
    table = recognition_by_yaw(predicted, gallery, person, yaw)
    assert {where: (row["people"], row["views"]) for where, row in table.items()} == {
        "all": (5, 10),
        "0-45": (5, 9),
        "0-30": (5, 9),
        "45-90": (1, 1),
        "75-90": (1, 1),
    }


def test_folds_without_others_to_set_the_threshold_tell_no_accuracy():
    assert verification_hits(torch.ones(3, 4), torch.eye(2, 4), torch.zeros(3, dtype=torch.long)).isnan().all()


def test_a_fold_is_decided_by_the_threshold_of_the_others():
    similarity = torch.tensor([0.9, 0.6, 0.5, 0.4, 0.8, 0.7, 0.3, 0.2])
    same = torch.tensor([True, False, True, False, True, True, False, False])
    fold = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    # fold 1 is all right from .7 on, which refuses the .5 of fold 0. Fold 0 has 3 of 4 right from .9 on, and no more
    # from .5 on; the lower threshold is the first one that is as good, and all of fold 1 is right by it.
    assert fold_hits(similarity, same, fold).tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    equal = torch.tensor([0.5, 0.4, 0.5, 0.3])  # what equals the threshold is accepted
    assert fold_hits(equal, torch.tensor([True, False] * 2), torch.tensor([0, 0, 1, 1])).tolist() == [1, 1, 1, 1]


def test_a_pair_does_not_decide_about_its_own_threshold():
    """Two folds that want different thresholds: each is wrong by the other's."""
    similarity, same = torch.tensor([0.9, 0.8, 0.3, 0.2]), torch.tensor([True, False, True, False])
    assert fold_hits(similarity, same, torch.tensor([0, 0, 1, 1])).tolist() == [1, 0, 0, 1]
    assert fold_hits(similarity, same, torch.tensor([0, 1, 0, 1])).isfinite().sum() == 2  # fold 1 has one to go by
    assert fold_hits(similarity, same, torch.zeros(4).long()).isnan().all()


@pytest.mark.parametrize("noise", [0.2, 1.0])
def test_hits_are_those_of_ten_folds_in_words(noise):
    same, fold = torch.arange(300) % 2 == 0, torch.arange(300) * 10 // 300
    similarity = same + noise * torch.randn(300)
    wanted = ten_fold_accuracy(*(similarity[s].numpy() for s in (same, ~same)), fold[same].numpy())
    assert fold_hits(similarity, same, fold).mean().item() == pytest.approx(wanted)
    order = torch.randperm(300)
    assert torch.equal(fold_hits(similarity[order], same[order], fold[order]), fold_hits(similarity, same, fold)[order])


def test_counts_of_pairs_by_hand():
    similarity = torch.tensor([0.5, 0.9, 0.5, 0.5, 0.2, 0.7, 0.95, 0.9])
    same = torch.tensor([True, True, True, False, False, False, False, False])
    genuine, impostor = pair_counts(
        similarity, same, torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 1, 0, 0, 0]), 3)
    )
    assert genuine.tolist() == [[1, 1], [1, 0], [0, 0]]  # at .5 and .9
    # below .5, at .5, between, at .9, above
    assert impostor.tolist() == [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("decimals", [1, 7])  # with ties, and without
def test_rates_of_pairs_are_those_of_scikit_learn(decimals):
    same, group = torch.rand(500) < 0.3, torch.randint(3, (500,))
    similarity = (same + 1.2 * torch.randn(500)).double().round(decimals=decimals)
    genuine, impostor = pair_counts(similarity, same, torch.nn.functional.one_hot(group, 3))
    for i in range(3):
        mine = group == i
        wanted = roc_auc_score(same[mine], similarity[mine])
        assert roc_auc(genuine[i], impostor[i]).item() == pytest.approx(wanted, abs=1e-9)
    assert roc_auc(genuine.sum(0), impostor.sum(0)).item() == pytest.approx(roc_auc_score(same, similarity), abs=1e-9)
    far, tar, _ = roc_curve(same, similarity, drop_intermediate=False)
    assert equal_error_rate(genuine.sum(0), impostor.sum(0)).item() == pytest.approx(np.maximum(far, 1 - tar).min())
    assert tar_at_far(genuine.sum(0), impostor.sum(0), 0.1).item() == pytest.approx(tar[far <= 0.1].max())


@pytest.mark.parametrize(("better", "rank5"), [(4, 1.0), (5, 0.0)])
def test_the_fifth_is_among_five_and_the_sixth_is_not(better, rank5):
    """One probe, and so many people who are more similar to it than the right one."""
    angle = torch.linspace(0.1, 1.0, 9)
    gallery = torch.stack((angle.cos(), angle.sin()), 1)
    found = recognition_by_yaw(torch.tensor([[1.0, 0.0]]), gallery, torch.tensor([better]), torch.zeros(1))["all"]
    assert found["rank5"] == rank5 and found["rank1"] == 0
