import json
import resource

import pytest
import torch
from conftest import people

from viewdiff_nb.faces import FaceDataError, Split, load_split_file, save_split, split_by_person

PARTS = ("train", "val", "test")


def names_of(split: Split) -> list[tuple[str, ...]]:
    return [getattr(split, part).names for part in PARTS]


def test_split_is_by_identity_complete_and_seeded():
    faces = people(40)
    split = split_by_person(faces, val=5, test=10, seed=3)
    names = [set(part) for part in names_of(split)]
    assert [len(n) for n in names] == [25, 5, 10] and len(set.union(*names)) == 40
    assert sum(len(part) for part in (split.train, split.val, split.test)) == len(faces)
    for part in (split.train, split.val, split.test):
        wanted = torch.stack([faces.front[faces.names.index(name)] for name in part.names])
        assert torch.equal(part.front, wanted) and torch.equal(part.target, wanted[part.person])
    assert split_by_person(faces, 5, 10, seed=3).test.names == split.test.names
    assert split_by_person(faces, 5, 10, seed=4).test.names != split.test.names
    assert split_by_person(faces, 8, 10, seed=3).test.names == split.test.names  # val does not move the test people


def test_split_refuses_too_few_people():
    with pytest.raises(ValueError, match="of 10 people, val=5 and test=4"):
        split_by_person(people(10), 5, 4)


def test_the_test_people_of_the_figures_stay():
    """The published figures are of this draw: 300 test people, seed 0."""
    split = split_by_person(people(1800, views=1, width=2), val=200, test=300)
    order = torch.randperm(1800, generator=torch.Generator().manual_seed(0)).tolist()
    parts = order[:1300], order[1300:1500], order[1500:]
    assert names_of(split) == [tuple(f"person_{i:04d}" for i in sorted(part)) for part in parts]


def test_people_without_views_are_split_too():
    faces = people(20)
    split = split_by_person(faces.where(faces.person > 6), 4, 4)
    assert sum(len(part) for part in names_of(split)) == 20


def test_a_written_split_is_read_again(tmp_path):
    faces = people(20)
    split = split_by_person(faces, 4, 6, seed=5)
    save_split(tmp_path / "split.json", split)
    content = json.loads((tmp_path / "split.json").read_text(encoding="utf-8"))
    assert content["sizes"] == {"train": 10, "val": 4, "test": 6} and content["seed"] == 5
    again = load_split_file(tmp_path / "split.json", faces)
    assert names_of(again) == names_of(split) and again.seed == 5
    for part in PARTS:
        assert torch.equal(getattr(again, part).src, getattr(split, part).src)
    shuffled = load_split_file(tmp_path / "split.json", faces.select(torch.randperm(20)))  # whatever the set's order
    assert names_of(shuffled) == names_of(split) and torch.equal(shuffled.test.front, split.test.front)


def test_three_lists_of_names_make_a_split(tmp_path):
    faces = people(6)
    parts = {"train": faces.names[:2], "val": faces.names[4:], "test": faces.names[2:4]}
    (tmp_path / "mine.json").write_text(json.dumps(parts))
    split = load_split_file(tmp_path / "mine.json", faces)
    assert names_of(split) == list(parts.values()) and split.seed is None


def edited(change):
    def damage(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content))

    return damage


def stranger(content):
    content["val"][1] = "nobody"


def moved(content):
    content["train"].append(content["val"].pop())


def forgotten(content):
    content["train"].pop()
    del content["sizes"]


BAD = {
    "no JSON": (lambda path: path.write_text("{"), "split.json: not valid JSON"),
    "a list": (lambda path: path.write_text("[]"), "'train' must list the names of 2 people or more"),
    "no part": (edited(lambda c: c.pop("val")), "'val' must list the names of 2 people or more"),
    "numbers": (edited(lambda c: c.update(test=[1, 2])), "'test' must list the names of 2 people or more"),
    "unknown": (edited(stranger), "1 people are not in this face set, e.g. 'nobody'"),
    "overlap": (edited(lambda c: c["test"].__setitem__(0, c["train"][0])), "is in train and again in test"),
    "twice": (edited(lambda c: c["val"].__setitem__(0, c["val"][1])), "is in val and again in val"),
    "moved": (edited(moved), r"sizes are \{.*'train': 10, .*, but the lists hold \{'train': 11"),
    "forgotten": (edited(forgotten), "1 of this set's 20 people are in no part, e.g. 'person_"),
    "nested": (lambda path: path.write_text("[" * 100_000), "split.json: not valid JSON: .*nested"),
    "half a character": (edited(lambda c: c["val"].__setitem__(1, "\ud800")), "'val' must list the names"),
    "a long fingerprint": (edited(lambda c: c.update(people="x" * 5000)), "a split of another set"),
    "a long stranger": (edited(lambda c: c["val"].__setitem__(1, "x" * 5000)), "1 people are not in this face set"),
    "a seed in words": (edited(lambda c: c.update(seed="x" * 5000)), "seed must be a whole number"),
    "fingerprint": (edited(lambda c: c.update(people="0" * 16)), "a split of another set: .* is '0000000000000000'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_makes_no_split_is_refused(tmp_path, case):
    damage, message = BAD[case]
    faces, path = people(20), tmp_path / "split.json"
    save_split(path, split_by_person(faces, 4, 6))
    damage(path)
    with pytest.raises(FaceDataError, match=message) as caught:
        load_split_file(path, faces)
    assert len(str(caught.value)) < 500


def test_a_split_is_not_lost_when_the_disk_is_full(tmp_path):
    path, split = tmp_path / "split.json", split_by_person(people(60), 4, 6)
    save_split(path, split)
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        with pytest.raises(OSError, match=r"File too large"):
            save_split(path, split)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["split.json"]


def test_a_split_of_another_set_is_refused(tmp_path):
    save_split(tmp_path / "split.json", split_by_person(people(20), 4, 6))
    for other in (people(20, first=5), people(30), people(10)):
        with pytest.raises(FaceDataError, match="a split of another set"):
            load_split_file(tmp_path / "split.json", other)


@pytest.mark.parametrize(
    "count,views,expected",
    [
        (1800, 16, (180, 270)),
        (400, 16, (40, 60)),
        (100, 6, (14, 15)),  # 14 * 13 * 6 >= 1000 > 13 * 12 * 6
        (40, 6, (10, 10)),
        (12, 5, (3, 3)),
        (6, 5, (2, 2)),
    ],
)
def test_by_default_shares_are_held_out(count, views, expected):
    faces = people(count, views=views)
    split = split_by_person(faces)
    assert (len(split.val.names), len(split.test.names)) == expected
    assert split.val.names == split_by_person(faces, *expected).val.names
    assert len(split_by_person(faces, val=2).val.names) == 2  # and what is said counts


def test_five_people_are_too_few():
    with pytest.raises(ValueError, match="of 5 people, val=2 and test=2 must be at least 2 each and leave 2 to train"):
        split_by_person(people(5))
