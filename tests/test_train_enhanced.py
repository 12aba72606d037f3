import pytest
from conftest import people, write_set

from viewdiff_nb import train_enhanced
from viewdiff_nb.faces import save_split, split_by_person
from viewdiff_nb.train_enhanced import main

SMALL = ["--d_model", "32", "--nhead", "4", "--num_layers", "1", "--dim_feedforward", "48", "--epochs", "1",
         "--device", "cpu"]  # fmt: skip


def test_a_split_file_says_who_trains(tmp_path, monkeypatch):
    faces = people(50)
    write_set(tmp_path / "set", faces)
    split = split_by_person(faces, val=20, test=5, seed=9)
    save_split(tmp_path / "split.json", split)
    seen = []
    original = train_enhanced.train
    monkeypatch.setattr(train_enhanced, "train", lambda config, *parts: seen.extend(parts) or original(config, *parts))
    main(["--data_dir", str(tmp_path / "set"), "--split_file", str(tmp_path / "split.json"), "--mixup", *SMALL])
    assert [part.names for part in seen] == [split.train.names, split.val.names]


def test_a_split_of_another_set_is_refused_before_training(tmp_path):
    write_set(tmp_path / "set", people(50))
    save_split(tmp_path / "split.json", split_by_person(people(50, first=200), val=20, test=5))
    with pytest.raises(SystemExit, match="a split of another set"):
        main(["--data_dir", str(tmp_path / "set"), "--split_file", str(tmp_path / "split.json"), *SMALL])


@pytest.mark.parametrize("flags,message", [
    (["--mixup", "--use_cross_view", "--batch_size", "30"], "use either mixup or use_cross_view"),
    (["--paired_views", "--batch_size", "31"], "paired_views needs an even batch_size, got 31"),
])  # fmt: skip
def test_pairs_and_mixup_refuse_what_contradicts_them(flags, message, capsys):
    with pytest.raises(SystemExit):
        main([*flags, *SMALL])
    words = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in words
