"""Pairs of a verification, in the kit's file, as CPLFW lists them, and in InsightFace's pickles."""

import io
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from viewdiff_nb.faces import FaceDataError
from viewdiff_nb.faces.pairs import (
    HEAD,
    Pairs,
    open_crop,
    pairs_in_order,
    read_insightface_bin,
    read_pairs,
    read_picture_pairs,
    write_pairs,
)

COLUMNS = ("first", "second", "same", "fold")


def random_pairs(count=40):
    return Pairs(
        torch.randint(9, (count,)), torch.randint(9, (count,)), torch.rand(count) < 0.5, torch.arange(count) % 10
    )


def refused(call, path, message):
    """Exactly one kind of error, which begins with the file."""
    with pytest.raises(FaceDataError, match=message) as found:
        call()
    assert str(found.value).startswith(str(path))


def test_what_is_written_is_read(tmp_path):
    pairs = random_pairs()
    write_pairs(tmp_path / "pairs.csv", pairs)
    found = read_pairs(tmp_path / "pairs.csv", 9)
    assert len(found) == 40
    for column in COLUMNS:
        assert torch.equal(getattr(found, column), getattr(pairs, column)), column
        assert getattr(found, column).dtype == getattr(pairs, column).dtype, column


def test_the_file_can_be_written_by_hand(tmp_path):
    (tmp_path / "pairs.csv").write_text(f"{HEAD}\r\n 0, 2,1,0\r\n3,1,0,1\r\n\r\n")
    found = read_pairs(tmp_path / "pairs.csv", 4)
    assert [getattr(found, column).tolist() for column in COLUMNS] == [[0, 3], [2, 1], [True, False], [0, 1]]
    write_pairs(tmp_path / "again.csv", found)
    assert (tmp_path / "again.csv").read_text(encoding="utf-8") == f"{HEAD}\n0,2,1,0\n3,1,0,1\n"


GOOD = "0,1,1,0"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], f": line 1: must be {HEAD}"),
        (["first,second"], f": line 1: must be {HEAD}"),
        ([GOOD], f": line 1: must be {HEAD}"),
        ([HEAD], ": holds no pair"),
        ([HEAD, GOOD, "0,1,1"], ": line 3: must be 4 whole numbers with commas between them, got '0,1,1'"),
        ([HEAD, GOOD, "0,1,1,0,0"], ": line 3: must be 4 whole numbers"),
        ([HEAD, "0,x,1,0"], ": line 2: must be 4 whole numbers .* got '0,x,1,0'"),
        ([HEAD, "0,1.0,1,0"], ": line 2: must be 4 whole numbers"),
        ([HEAD, GOOD, "", GOOD], ": line 3: must be 4 whole numbers .* got ''"),
        ([HEAD, GOOD, GOOD, "0,9,1,0"], ": line 4: rows must be from 0 to 8, got 0 and 9"),
        ([HEAD, "-1,0,1,0"], ": line 2: rows must be from 0 to 8, got -1 and 0"),
        ([HEAD, "0,1,2,0"], ": line 2: same must be 1 or 0 and folds count from 0, got 2 and 0"),
        ([HEAD, "0,1,1,-1"], ": line 2: same must be 1 or 0 and folds count from 0, got 1 and -1"),
        ([HEAD, GOOD, f"0,1,1,{10**30}"], f": line 3: same must be 1 or 0 .* got 1 and {10**30}"),
    ],
)
def test_errors_name_file_and_line(tmp_path, lines, message):
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines))
    refused(lambda: read_pairs(path, 9), path, message)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(b"\xff\xfe\x00")
    refused(lambda: read_pairs(path, 9), path, "not a text in UTF-8")
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "nowhere.csv", 9)
    refused(lambda: read_pairs(tmp_path, 9), tmp_path, "cannot be read")


@pytest.mark.parametrize(("count", "sizes"), [(10, {1}), (60, {6}), (7000, {700}), (25, {2, 3})])
def test_folds_are_ten_equal_parts_in_order(count, sizes):
    pairs = pairs_in_order(torch.arange(count) % 2 == 0)
    assert pairs.first.tolist() == list(range(0, 2 * count, 2)) and pairs.second.tolist() == list(
        range(1, 2 * count, 2)
    )
    assert pairs.same.tolist() == [i % 2 == 0 for i in range(count)]
    assert pairs.fold.tolist() == sorted(pairs.fold.tolist()) and pairs.fold.unique().tolist() == list(range(10))
    assert set(pairs.fold.bincount().tolist()) == sizes


@pytest.mark.parametrize("same", [[True, False] * 4, [True] * 20, [False] * 20, []])
def test_too_few_or_one_sided_pairs_are_refused(same):
    number = f"got {sum(same)} same and {len(same) - sum(same)} different ones"
    with pytest.raises(FaceDataError, match=f"set.bin: .* 10 pairs or more for as many folds; {number}"):
        pairs_in_order(torch.tensor(same, dtype=torch.bool), source="set.bin")


@pytest.fixture
def listed(tmp_path):
    """A list as CPLFW's, of 12 pairs, every third different, and empty files as its pictures."""
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for pair in range(12):
        for name in (f"Some Body_{pair}.jpg", f"x_{pair}.jpg"):
            (images / name).touch()
            lines.append(f"{name} {int(pair % 3 > 0)}")
    (tmp_path / "pairs.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.txt", images


def test_a_list_of_cplfw_is_read(listed):
    path, images = listed
    paths, pairs = read_picture_pairs(path, images)
    assert len(paths) == 24 and paths[:3] == [images / n for n in ("Some Body_0.jpg", "x_0.jpg", "Some Body_1.jpg")]
    assert pairs.same.tolist() == [pair % 3 > 0 for pair in range(12)]
    assert [paths[i].name for i in pairs.first[:2]] == ["Some Body_0.jpg", "Some Body_1.jpg"]
    assert pairs.fold.unique().tolist() == list(range(10))


@pytest.mark.parametrize(
    ("row", "line", "message"),
    [
        (4, "Some Body_2.jpg", ": line 5: must be a picture's name, a space, and 1 or 0, got 'Some Body_2.jpg'"),
        (4, "Some Body_2.jpg 2", ": line 5: must be a picture's name"),
        (4, " 1", ": line 5: must be a picture's name, .* got '1'"),
        (4, "", ": line 5: must be a picture's name, .* got ''"),
        (23, "gone.jpg 1", ": line 24: there is no picture .*gone.jpg"),
        (5, "x_2.jpg 0", ": line 6: says 0, the line before it does not"),
        (23, None, ": two lines are a pair, and there are 23"),
    ],
)
def test_errors_of_a_list_name_file_and_line(listed, row, line, message):
    path, images = listed
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[row : row + 1] = [] if line is None else [line]
    path.write_text("\n".join(lines))
    refused(lambda: read_picture_pairs(path, images), path, message)


def test_a_list_that_makes_no_folds_names_the_file(listed):
    path, images = listed
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[:8]))
    refused(lambda: read_picture_pairs(path, images), path, "10 pairs or more for as many folds")


def colour(i):
    return (i * 10, 255 - i * 10, 40)


def picture(size=(112, 112), colour=(0, 0, 0), mode="RGB"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).convert(mode).save(file, "PNG")
    return file.getvalue()


def write_bin(path, pictures, same):
    """As InsightFace writes it."""
    path.write_bytes(pickle.dumps((pictures, same), protocol=4))
    return path


@pytest.fixture
def small_bin(tmp_path):
    return write_bin(
        tmp_path / "set.bin", [picture(colour=colour(i)) for i in range(24)], [i % 2 == 0 for i in range(12)]
    )


def test_insightfaces_pictures_are_decoded_in_order_as_rgb(small_bin):
    crops, pairs = read_insightface_bin(small_bin)
    assert crops.shape == (24, 112, 112, 3) and crops.dtype == np.uint8
    np.testing.assert_array_equal(crops[:, 5, 7], [colour(i) for i in range(24)])
    assert pairs.same.tolist() == [i % 2 == 0 for i in range(12)] and pairs.second[1] == 3


def test_pickles_of_python_2_with_numbers_for_bools_are_read(tmp_path):
    path = tmp_path / "old.bin"
    path.write_bytes(pickle.dumps([[picture()] * 20, [1, 0] * 5], protocol=0))
    assert b"_codecs" in path.read_bytes()  # protocol 0 of Python 3 writes bytes by a function's name, which is refused
    refused(lambda: read_insightface_bin(path), path, "it wants to run _codecs.encode")
    texts = b"".join(b"S" + repr(picture())[1:].encode() + b"\np" + str(i).encode() + b"\na" for i in range(1, 21))
    path.write_bytes(b"((lp0\n" + texts + b"(lp30\n" + b"I1\naI0\na" * 5 + b"tp31\n.")  # as Python 2 does
    crops, pairs = read_insightface_bin(path)
    assert len(crops) == 20 and pairs.same.tolist() == [True, False] * 5


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["whole", "picture", "same"])
def test_a_pickle_that_wants_to_run_something_is_refused_and_not_run(tmp_path, place, protocol):
    path, evil = tmp_path / "evil.bin", Evil(f"touch {tmp_path / 'was_run'}")
    content = {"whole": evil, "picture": ([evil] * 20, [True] * 10), "same": ([picture()] * 20, [evil] * 10)}[place]
    path.write_bytes(pickle.dumps(content, protocol))
    if place != "same" or protocol > 2:  # before, bytes are refused first
        refused(lambda: read_insightface_bin(path), path, f"it wants to run {os.system.__module__}.system")
    else:
        refused(lambda: read_insightface_bin(path), path, "it wants to run _codecs.encode")
    assert not (tmp_path / "was_run").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "was_run").exists()  # without the safeguard


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no verification set of InsightFace"),
        (b"no pickle", "no verification set of InsightFace"),
        (pickle.dumps([1, 2, 3]), "no verification set of InsightFace"),
        (pickle.dumps(5), "no verification set of InsightFace"),
        (pickle.dumps((5, 6)), "no verification set of InsightFace"),
        (pickle.dumps(([b"x"] * 3, [True] * 2)), "must hold encoded pictures, two for each of 2 pairs"),
        (pickle.dumps((["x"] * 4, [True] * 2)), "must hold encoded pictures, two for each of 2 pairs"),
        (pickle.dumps(([b"x"] * 20, [True, False] * 5)), ": picture 0: cannot be read"),
        (
            pickle.dumps(([picture(), picture((111, 112))] * 10, [True, False] * 5)),
            r": picture 1: an aligned crop has 112 x 112 ",
        ),
        (pickle.dumps(([picture(), picture()[:-60]] * 10, [True, False] * 5)), ": picture 1: cannot be read"),
        (pickle.dumps(([picture()] * 20, [True] * 10)), "needs same and different pairs"),
        (pickle.dumps(([picture()] * 20, [True, None] * 5)), "two for each of 10 pairs, which are same or not"),
        (pickle.dumps(([], [])), "needs same and different pairs"),
    ],
)
def test_other_content_is_refused_with_the_file(tmp_path, content, message):
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    refused(lambda: read_insightface_bin(path), path, message)


def test_truncated_anywhere_it_is_refused(small_bin):
    whole = small_bin.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 50).astype(int):
        small_bin.write_bytes(whole[:length])
        refused(lambda: read_insightface_bin(small_bin), small_bin, "no verification set of InsightFace")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_insightface_bin(tmp_path / "nowhere.bin")


def test_a_grey_crop_becomes_rgb(tmp_path):
    (tmp_path / "grey.png").write_bytes(picture(colour=(90, 90, 90), mode="L"))
    assert (open_crop(tmp_path / "grey.png", "grey") == 90).all()


@pytest.mark.parametrize("name", ["../outside.jpg", "a" * 5000, "a/../../outside.jpg"])
def test_a_list_of_strangers_reads_no_file_outside_of_its_folder(tmp_path, name):
    """It once raised what the operating system says of a name that is too long, and followed two dots."""
    (tmp_path / "images").mkdir()
    for path in (tmp_path / "outside.jpg", tmp_path / "images" / "in.jpg"):
        path.write_bytes(b"picture")
    (tmp_path / "pairs.txt").write_text(f"in.jpg 1\n{name} 1\n")
    with pytest.raises(FaceDataError, match=r"pairs.txt: line 2: there is no picture '") as found:
        read_picture_pairs(tmp_path / "pairs.txt", tmp_path / "images")
    assert len(str(found.value)) < 1000


def test_long_lines_are_quoted_in_short(tmp_path):
    (tmp_path / "pairs.csv").write_text("first,second,same,fold\n" + "9" * 7000 + "\n")
    with pytest.raises(FaceDataError, match="line 2") as found:
        read_pairs(tmp_path / "pairs.csv", 4)
    assert len(str(found.value)) < 1000
