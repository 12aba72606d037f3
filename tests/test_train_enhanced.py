import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from datetime import date

import pytest
from conftest import people, write_set

from viewdiff_nb import train_enhanced
from viewdiff_nb.faces import save_split, split_by_person
from viewdiff_nb.train_enhanced import main, parse
from viewdiff_nb.training.checkpoint import load_model
from viewdiff_nb.training.config import TrainConfig
from viewdiff_nb.training.result import predict

SMALL = [
    "--d_model",
    "32",
    "--nhead",
    "4",
    "--num_layers",
    "1",
    "--dim_feedforward",
    "48",
    "--epochs",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A run that is given no save_dir makes a folder where it is started."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("count", [8, 60, 501])
def test_the_plain_command_trains_with_any_number_of_people_and_keeps_the_model(tmp_path, capsys, count):
    faces = people(count)
    write_set(tmp_path / "set", faces)
    main(["--data_dir", "set", *SMALL])
    said = capsys.readouterr().out
    split = split_by_person(faces)
    sizes = [len(part.names) for part in (split.train, split.val, split.test)]
    assert sum(sizes) == count
    assert "{} people train, {} validate, {} are kept for a test".format(*sizes) in said
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name[:10] == date.today().isoformat() and f"runs/{folder.name}" in said
    assert f"runs/{folder.name}/best_model_enhanced.safetensors" in said
    assert (folder / "checkpoint_epoch_1_enhanced.pth").exists()
    model = load_model(folder / "best_model_enhanced.safetensors")
    assert predict(model, faces).shape == faces.src.shape


@pytest.mark.parametrize("told", [[], ["--save_dir", "mine"]], ids=str)
def test_standard_output_that_takes_nothing_is_told_in_a_line(tmp_path, told):
    write_set(tmp_path / "set", people(60))
    command = [sys.executable, "-m", "viewdiff_nb.train_enhanced", "--data_dir", "set", *SMALL, *told]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 1
    assert "error: cannot write to standard output: No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr


def test_a_pipe_that_closes_after_a_line_is_told_in_a_line(tmp_path):
    write_set(tmp_path / "set", people(60))
    command = [sys.executable, "-m", "viewdiff_nb.train_enhanced", "--data_dir", "set", *SMALL, "--save_dir", "mine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "people train" in process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1 and "Traceback" not in errors and "Exception ignored" not in errors
    assert "error: cannot write to standard output: Broken pipe" in errors
    assert (tmp_path / "mine/checkpoint_epoch_1_enhanced.pth").exists()


@pytest.mark.parametrize("redirected", ["2>&-", ">&-", ">&- 2>&-"])
def test_streams_that_are_closed_do_not_matter(tmp_path, redirected):
    write_set(tmp_path / "set", people(60))
    command = shlex.join([sys.executable, "-m", "viewdiff_nb.train_enhanced", "--data_dir", "set", *SMALL])
    assert subprocess.run(f"{command} {redirected}", shell=True, check=False, stdin=subprocess.DEVNULL).returncode == 0
    assert list(tmp_path.glob("runs/*/best_model_enhanced.pth"))


def test_a_folder_that_was_moved_or_copied_goes_on_where_it_is(tmp_path, capsys):
    write_set(tmp_path / "set", people(60))
    main(["--data_dir", "set", *SMALL, "--save_dir", "first"])
    shutil.copytree("first", "copy")
    before = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    main(["--resume", "copy", "--epochs", "2"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()} == before
    assert (tmp_path / "copy/checkpoint_epoch_2_enhanced.pth").exists()
    assert "kept in copy" in capsys.readouterr().out


def test_two_runs_within_a_second_have_folders_of_their_own(tmp_path):
    write_set(tmp_path / "set", people(60))
    for _ in range(2):
        main(["--data_dir", "set", *SMALL])
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_split_file_that_is_not_there_is_named(tmp_path):
    write_set(tmp_path / "set", people(60))
    with pytest.raises(SystemExit, match="error: there is no split file nowhere.json"):
        main(["--data_dir", "set", "--split_file", "nowhere.json", *SMALL])


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


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--mixup", "--use_cross_view", "--batch_size", "30"], "use either mixup or use_cross_view"),
        (["--paired_views", "--batch_size", "31"], "paired_views needs an even batch_size, got 31"),
    ],
)
def test_pairs_and_mixup_refuse_what_contradicts_them(flags, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main([*flags, *SMALL])


def test_help_shows_the_guides_flags_in_groups_each_with_a_word(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    shown = capsys.readouterr().out
    assert not ended.value.code and all(
        f"{group} options" in shown for group in ("data", "model", "adaptation", "training", "files")
    )
    flags = re.findall(r"(?m)^[│ ]+--([a-z]\w+)", shown)
    assert set(flags) == {field.name for field in fields(TrainConfig)}
    words = " ".join(shown.replace("│", " ").split())
    bare = [flag for flag in flags if re.search(rf"--{flag} [^ ]+ \(default", words)]
    assert not bare and "guide: ten times lr" in words


def test_hyphens_are_underscores():
    assert parse(["--lora-lr", "0.5", "--use-lora-attention"]) == parse(["--lora_lr", "0.5", "--use_lora_attention"])
