import numpy as np
import onnxruntime
import pytest
from conftest import CONFIG, network_that_moves, people

from viewdiff_nb.drop_in import DropIn
from viewdiff_nb.export import export_onnx, main
from viewdiff_nb.modules.adjusted import Adjusted
from viewdiff_nb.training import predict
from viewdiff_nb.training.checkpoint import save_weights

RAW = (0.0, "none")
WAYS = (RAW, (0.0, "even"), (0.25, "none"), (0.5, "even"), (1.0, "none"))


@pytest.fixture(scope="module")
def faces():
    return people(7, views=20)


@pytest.fixture(scope="module")
def network(faces):
    return network_that_moves(faces.feature_dim)


@pytest.mark.parametrize("kind", ["network", "drop-in"])
def test_the_graph_gives_the_same_numbers(network, faces, kind, tmp_path):
    model = network
    if kind == "drop-in":
        given = faces.src, faces.angles, faces.keypoints_3d, faces.front
        fits = {way: Adjusted(network if way[0] else None, *given, step=way[0], centring=way[1]) for way in WAYS}
        model = DropIn.of(fits, WAYS)
    assert export_onnx(model, tmp_path / "m.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    given = {"embedding": faces.src, "angles": faces.angles, "keypoints_3d": faces.keypoints_3d}
    (found,) = session.run(["frontal"], {name: values.numpy() for name, values in given.items()})
    np.testing.assert_allclose(found, predict(model, faces).numpy(), atol=1e-5)


def test_the_command(network, tmp_path, capsys):
    save_weights(tmp_path / "network.safetensors", network.state_dict(), CONFIG.to_dict())
    main([str(tmp_path / "network.safetensors"), str(tmp_path / "out.onnx"), "--no-drop_in"])
    assert "from torch" in capsys.readouterr().out and (tmp_path / "out.onnx").stat().st_size > 1000
    for arguments, words in (
        (["network.safetensors", "out.onnx"], "holds a network alone"),
        (["network.safetensors", "out.npy", "--no-drop_in"], "OUT must be an .onnx file"),
        (["none.pth", "out.onnx"], "there is no checkpoint"),
    ):
        with pytest.raises(SystemExit, match=words):
            main([str(tmp_path / word) if "." in word and "-" not in word else word for word in arguments])


def test_a_graph_with_other_numbers_is_not_left(network, tmp_path, monkeypatch):
    monkeypatch.setattr("viewdiff_nb.export.TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="ONNX Runtime is off by"):
        export_onnx(network, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
