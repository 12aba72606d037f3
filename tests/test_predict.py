import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIG, network_that_moves, people, write_set

from viewdiff_nb.drop_in import DropIn
from viewdiff_nb.faces.geometry import MEAN_FACE, rotation_matrix
from viewdiff_nb.faces.views import load_face_views
from viewdiff_nb.files import read_safetensors, write_safetensors
from viewdiff_nb.modules.baselines import RawEmbedding
from viewdiff_nb.predict import frontal_embeddings, load_any, main, predict_file
from viewdiff_nb.pretrained import save_drop_in
from viewdiff_nb.training import predict
from viewdiff_nb.training.checkpoint import build_model, save_weights

RAW = (0.0, "none")
WAYS = (RAW, RAW, (0.25, "none"), (0.5, "none"), (1.0, "none"))


@pytest.fixture(scope="module")
def faces():
    return people(6, views=20)


@pytest.fixture(scope="module")
def model(faces):
    network = network_that_moves(faces.feature_dim).half().float()  # what half precision keeps
    return DropIn(network, WAYS)


@pytest.fixture
def files(tmp_path, model, faces):
    """A face set, the same as arrays, a drop-in and a checkpoint."""
    save_drop_in(tmp_path / "drop_in.safetensors", model, CONFIG, "a recogniser")
    save_weights(tmp_path / "network.safetensors", model.model.state_dict(), CONFIG.to_dict())
    write_set(tmp_path / "set", faces)
    arrays = {"src": faces.src, "poses": faces.angles.rad2deg(), "keypoints": faces.keypoints_3d}
    for name, values in arrays.items():
        np.save(tmp_path / f"{name}.npy", values.numpy())
    return tmp_path


def run(files, *arguments):
    """The command; relative names are of files."""
    main([str(files / word) if (files / word).exists() or word == "out.npy" else word for word in arguments])
    return np.load(files / "out.npy", allow_pickle=False), json.loads((files / "out.json").read_text(encoding="utf-8"))


def test_a_face_set_and_its_arrays_give_what_training_predicts(files, model):
    expected = predict(model, load_face_views(files / "set")).numpy()
    found, report = run(files, "drop_in.safetensors", "set", "out.npy", "--device", "cpu")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == np.float32 and report["samples"] == 120 and report["recogniser"] == "a recogniser"
    assert report["step and centring by |yaw|"]["75-90"] == [1.0, "none"] and report["keypoints"] == "given"
    assert report["samples by |yaw|"] == {"0-30": 36, "30-45": 24, "45-60": 24, "60-75": 12, "75-90": 24}
    given = ("--poses", "poses.npy", "--keypoints", "keypoints.npy", "--batch_size", "7", "--device", "cpu")
    again, _ = run(files, "drop_in.safetensors", "src.npy", "out.npy", *given)
    np.testing.assert_allclose(again, expected, atol=1e-5)


def test_unknown_keypoints_are_a_mean_face_at_the_pose(files, model, faces):
    found, report = run(files, "drop_in.safetensors", "src.npy", "out.npy", "--poses", "poses.npy", "--device", "cpu")
    points = torch.stack([torch.tensor(MEAN_FACE) @ rotation_matrix(a).T for a in faces.angles])
    expected = model(faces.src, faces.angles, points, return_residual=False).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert report["keypoints"] == "a mean face at the pose"
    assert abs(found - predict(model, faces).numpy()).max() > 1e-3


def test_the_whole_answer_on_request(files, model, faces, capsys):
    for name in ("drop_in.safetensors", "network.safetensors"):
        found, report = run(files, name, "set", "out.npy", "--no-drop_in", "--device", "cpu")
        np.testing.assert_allclose(found, predict(model.model, faces).numpy(), atol=2e-3)
        assert report["step and centring by |yaw|"] is None and not report["drop_in"]
    assert "the network's whole answer" in capsys.readouterr().out


def test_a_network_alone_is_no_drop_in(files):
    with pytest.raises(SystemExit, match="holds a network alone"):
        run(files, "network.safetensors", "set", "out.npy")
    assert not (files / "out.npy").exists()


def test_a_damaged_drop_in_is_not_taken_for_a_network(files):
    tensors, header = read_safetensors(files / "drop_in.safetensors", ValueError)
    write_safetensors(files / "drop_in.safetensors", tensors, header | {"ways": "[]"})
    with pytest.raises(SystemExit, match="drop_in.safetensors holds no drop-in"):
        run(files, "drop_in.safetensors", "set", "out.npy")
    (files / "drop_in.safetensors").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="holds a network alone|truncated"):
        run(files, "drop_in.safetensors", "set", "out.npy")


def test_a_device_that_is_not_there_is_said(files):
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        run(files, "drop_in.safetensors", "set", "out.npy", "--device", "nowhere")


def test_the_shipped_model_is_found_by_its_name():
    model, about = load_any("mobilefacenet")
    assert isinstance(model, DropIn) and about["recogniser"].startswith("MobileFaceNet")
    network, _ = load_any("mobilefacenet", drop_in=False)
    assert network is not model and network.feature_dim == 384


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("drop_in.safetensors", "src.npy", "out.npy"), "says nothing of head poses"),
        (("drop_in.safetensors", "set", "out.npy", "--poses", "poses.npy"), "a face set with poses"),
        (("drop_in.safetensors", "none", "out.npy"), "must be the folder of a face set or a .npy"),
        (("drop_in.safetensors", "set", "set"), "OUT must be a .npy file"),
        (("drop_in.safetensors", "set", "out.npy", "--batch_size", "0"), "batch_size must be 1 or more"),
        (("none.pth", "set", "out.npy"), "there is no checkpoint none.pth"),
        (("mobilefacenet", "set", "out.npy"), "embeddings are 32 wide, and the model reads 384"),
        (("drop_in.safetensors", "src.npy", "out.npy", "--poses", "src.npy"), "shape is"),
        (("drop_in.safetensors", "src.npy", "out.npy", "--poses", "poses.npy", "--keypoints", "src.npy"), "shape is"),
    ],
)
def test_what_cannot_be_used_is_said(files, arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        run(files, *arguments)
    assert words in f"{error.value} {capsys.readouterr().err}"
    assert not (files / "out.npy").exists() and not list(files.glob("*.part"))


def test_numbers_that_are_not_finite_leave_no_file(files):
    poses = np.load(files / "poses.npy")
    poses[5, 1] = np.nan
    np.save(files / "poses.npy", poses)
    with pytest.raises(SystemExit, match=r"poses.npy: row 5: not finite"):
        run(files, "drop_in.safetensors", "src.npy", "out.npy", "--poses", "poses.npy")
    assert not (files / "out.npy").exists()


def test_arrays_and_tensors_from_python(model, faces):
    expected = predict(model, faces).numpy()
    poses = faces.angles.rad2deg()
    given = faces.src.numpy().astype(np.float16), poses.numpy(), faces.keypoints_3d.numpy()
    np.testing.assert_allclose(frontal_embeddings(model, *given, batch_size=50), expected, atol=2e-3)
    np.testing.assert_allclose(frontal_embeddings(model, faces.src, poses, faces.keypoints_3d), expected, atol=1e-5)
    assert frontal_embeddings(model, faces.src[:0], poses[:0]).shape == (0, 32)
    np.testing.assert_allclose(
        frontal_embeddings(RawEmbedding(), faces.src, poses), F.normalize(faces.src, dim=1).numpy(), atol=1e-6
    )


def test_arrays_that_do_not_fit(model, faces):
    poses = faces.angles.rad2deg()
    for given in ((faces.src[0], poses), (faces.src, poses[:-1]), (faces.src, poses, faces.keypoints_3d[:, :4])):
        with pytest.raises(ValueError, match=r"must be \(N, D\), \(N, 3\), \(N, 5, 3\) of one N"):
            frontal_embeddings(model, *given)
    src = faces.src.clone()
    src[100, 3] = torch.inf
    with pytest.raises(ValueError, match="row 100: its embedding is not finite"):
        frontal_embeddings(model, src, poses, batch_size=32)


def test_views_that_meet_are_not_read_singly(faces):
    network = build_model(replace(CONFIG, use_cross_view=True, n_views=2, batch_size=4), faces.feature_dim)
    with pytest.raises(ValueError, match="use training.predict"):
        frontal_embeddings(network, faces.src, faces.angles)


def test_more_than_fits_in_memory_is_streamed(files, tmp_path):
    """200,000 samples, 26 MB in and out, with far less taken: only batches are held."""
    import resource

    rng = np.random.default_rng(0)
    np.save(files / "src.npy", rng.standard_normal((200_000, 32), np.float32))
    np.save(files / "poses.npy", rng.uniform(-80, 80, (200_000, 3)).astype(np.float32))
    arguments = files / "drop_in.safetensors", files / "src.npy", files / "out.npy"
    from viewdiff_nb.predict import PredictOptions

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = PredictOptions(poses=files / "poses.npy", batch_size=1024, device="cpu")
    report = predict_file(str(arguments[0]), *arguments[1:], options)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert report["samples"] == 200_000 and np.load(files / "out.npy", mmap_mode="r").shape == (200_000, 32)
    assert grown < 60e6  # the map of the source counts as well


def test_what_stays_raw_is_not_asked_of_the_network():
    """And is the embedding itself, bit for bit, however long it is."""
    asked = []
    network = network_that_moves(32)
    network.register_forward_pre_hook(lambda module, inputs: asked.append(len(inputs[0])))
    model = DropIn(network, [(0.0, "none")] * 2 + [(0.5, "none")] * 3)
    faces = people(10, views=6)
    src = 3 * faces.src
    found = frontal_embeddings(model, src, faces.angles.rad2deg(), faces.keypoints_3d, batch_size=25)
    far = faces.abs_yaw >= 45
    assert sum(asked) == int(far.sum()) < len(faces)
    assert np.array_equal(found[~far], src[~far].numpy()) and not np.allclose(found[far], src[far].numpy())
    with torch.no_grad():
        whole = model(src, faces.angles, faces.keypoints_3d, return_residual=False)
    np.testing.assert_allclose(found, whole.numpy(), atol=1e-5)
