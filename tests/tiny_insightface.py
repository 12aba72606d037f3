"""Small ONNX models with the inputs and outputs of InsightFace's buffalo_l, and pictures that they can read.

The pictures are heads from the kit's renderer, in grey, with a coloured disc on each of the five keypoints. The
disc's red and blue say which keypoint it is, its green how near to the camera. The models find the discs by colour:
the detector (the nine outputs of SCRFD) wherever there is a nose, the landmark model in its crop; that one fits
InsightFace's 68-point mean face to the five points, so that InsightFace's own pose estimate has something to read.
The recogniser averages blocks of the aligned crop and projects them.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnx
from insightface.data import get_object
from onnx import TensorProto, helper, numpy_helper
from people.render import HeadRenderer, Mesh
from people.scenes import Background, Light

SIZE = 512  # of a picture, pixels
UNIT = 0.1127  # metres of one unit of the mean face: 62 mm between the eyes
DISC, RING = 10, 14  # radii in pixels; the grey ring keeps a disc's edge from looking like another disc
RED_BLUE = np.array([(255, 0), (0, 255), (255, 128), (128, 255), (0, 128)], np.float32)
COLOUR_TOLERANCE = 50.0
DEPTH_CODE = 90.0  # steps of green for a depth as large as the distance from eyes to mouth
PLACES = ([36, 39], [42, 45], [30], [48], [54])  # of 68: eye corners at the image's left, at its right, nose, mouth
EYES_TO_MOUTH = np.array([-0.5, -0.5, 0.0, 0.5, 0.5], np.float32)

mean_68 = get_object("meanshape_68.pkl").astype(np.float64)  # x right, y down, nose at +z
mean_five = np.stack([mean_68[rows].mean(0) for rows in PLACES])


def head(seed: int) -> HeadRenderer:
    """An ellipsoid with a random grey pattern and the keypoints of InsightFace's mean face."""
    rows, columns = np.meshgrid(np.linspace(0, np.pi, 25), np.linspace(0, 2 * np.pi, 49), indexing="ij")
    normals = np.stack([np.sin(rows) * np.sin(columns), -np.cos(rows), np.sin(rows) * np.cos(columns)], -1)
    uv = np.stack([columns / (2 * np.pi), rows / np.pi], -1)
    index = np.arange(25 * 49).reshape(25, 49)
    corners = [index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]]
    faces = np.concatenate([np.stack([corners[i] for i in ids], -1).reshape(-1, 3) for ids in ((0, 1, 2), (0, 2, 3))])
    flat = normals.reshape(-1, 3)
    mesh = Mesh(flat * (0.075, 0.11, 0.08), flat, uv.reshape(-1, 2), faces)
    pattern = np.random.default_rng(seed).integers(60, 230, (24, 24), np.uint8)
    texture = cv2.resize(pattern, (192, 192), interpolation=cv2.INTER_CUBIC)
    return HeadRenderer(mesh, np.repeat(texture[..., None], 3, 2), mean_five * UNIT)


@dataclass
class Photo:
    """picture: (SIZE, SIZE, 3) uint8 BGR. keypoints: (5, 3) truth in OpenCV's pixels. pose: degrees."""

    picture: np.ndarray
    keypoints: np.ndarray
    pose: tuple[float, float, float]


def take_photo(renderer: HeadRenderer, pose: tuple[float, float, float], discs: bool = True) -> Photo:
    """Render a head at (pitch, yaw, roll) in degrees."""
    picture, keypoints = renderer.picture(np.deg2rad(pose), Light(gloss=0.0), Background((0.5, 0.5, 0.5)), SIZE)
    keypoints = keypoints - (0.5, 0.5, 0.0)  # the renderer has pixel centres at halves, OpenCV at whole numbers
    picture = np.repeat(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
    if discs:
        centres = [tuple(round(float(v) * 16) for v in point[:2]) for point in keypoints]  # sixteenths of pixels
        length = np.linalg.norm(EYES_TO_MOUTH @ keypoints[:, :2])
        green = 128 + DEPTH_CODE * (keypoints[:, 2] - keypoints[:, 2].mean()) / length
        for centre in centres:
            cv2.circle(picture, centre, RING * 16, (128, 128, 128), -1, cv2.LINE_AA, 4)
        for centre, (red, blue), depth in zip(centres, RED_BLUE, green, strict=True):
            cv2.circle(picture, centre, DISC * 16, (float(blue), float(depth), float(red)), -1, cv2.LINE_AA, 4)
    return Photo(picture, keypoints, pose)


class Graph:
    """Collects ONNX nodes; `graph.Add(a, b)` appends one and returns its output's name."""

    def __init__(self) -> None:
        self.nodes, self.constants = [], []

    def __getattr__(self, kind: str):
        def node(*inputs, **attributes):
            names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
            output = f"{kind.lower()}_{len(self.nodes)}"
            self.nodes.append(helper.make_node(kind, names, [output], name=f"n{len(self.nodes)}", **attributes))
            return output

        return node

    def constant(self, value) -> str:
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        self.constants.append(numpy_helper.from_array(array, f"c{len(self.constants)}"))
        return self.constants[-1].name

    def save(self, path: Path, shape: list, outputs: dict[str, list]) -> None:
        """outputs: {name: shape}; the input is called input.1, as in buffalo_l."""
        given = [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, shape)]
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in outputs.items()]
        graph = helper.make_graph(self.nodes, path.stem, given, made, self.constants)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def disc_weights(graph: Graph, scale: float = 128.0) -> tuple[str, str]:
    """(1, 5, H, W) how much a pixel looks like each disc, and (1, 1, H, W) its green; input (x - 127.5) / scale."""
    channels = [graph.Slice("input.1", [c], [c + 1], [1]) for c in range(3)]
    likeness = []
    for channel, codes in ((channels[0], RED_BLUE[:, 0]), (channels[2], RED_BLUE[:, 1])):
        distance = graph.Abs(graph.Sub(channel, ((codes - 127.5) / scale).reshape(1, 5, 1, 1)))
        likeness.append(graph.Relu(graph.Sub(1.0, graph.Mul(distance, scale / COLOUR_TOLERANCE))))
    return graph.Mul(*likeness), graph.Add(graph.Mul(channels[1], scale), 127.5)


def make_detector(path: Path) -> None:
    """SCRFD with five keypoints: scores, box distances and keypoint offsets at strides 8, 16 and 32, two anchors."""
    graph, stride, window = Graph(), 32, 7
    weights, green = disc_weights(graph)
    ones = graph.Add(graph.Mul(green, 0.0), 1.0)
    grids = [graph.Sub(graph.CumSum(ones, axis), 1.0) for axis in (3, 2)]  # x, y of every pixel

    def pool(values, size=stride, **more):
        return graph.AveragePool(values, kernel_shape=[size, size], **({"strides": [size, size]} | more))

    def total(values):  # over the 7 x 7 cells around each cell
        around = {"strides": [1, 1], "pads": [window // 2] * 4, "count_include_pad": 1}
        return graph.Mul(pool(pool(values), window, **around), float(stride**2 * window**2))

    mass = total(weights)
    points = [graph.Div(total(graph.Mul(weights, grid)), graph.Add(mass, 1e-6)) for grid in grids]  # (1, 5, h, w)
    anchors = [graph.Sub(pool(grid), (stride - 1) / 2) for grid in grids]
    nose = graph.Mul(graph.Slice(pool(weights), [2], [3], [1]), float(stride**2))
    whole = graph.Clip(graph.ReduceMin(mass, axes=[1], keepdims=1), 0.0, 1.0)
    score = graph.Mul(graph.Div(nose, graph.Add(nose, 3.0)), whole)
    across = [graph.ReduceSum(graph.Mul(p, EYES_TO_MOUTH.reshape(1, 5, 1, 1)), [1], keepdims=1) for p in points]
    half = graph.Mul(graph.Sqrt(graph.Add(*(graph.Mul(a, a) for a in across))), 1.25)
    centre = [graph.Sub(graph.ReduceMean(p, axes=[1], keepdims=1), a) for p, a in zip(points, anchors, strict=True)]
    sides = [graph.Sub(half, c) for c in centre] + [graph.Add(half, c) for c in centre]
    box = graph.Div(graph.Concat(*sides, axis=1), float(stride))
    offsets = [graph.Unsqueeze(graph.Sub(p, a), [2]) for p, a in zip(points, anchors, strict=True)]
    flat = graph.Reshape(graph.Concat(*offsets, axis=2), [0, 10, -1])  # x, y of each point in turn
    rows = {32: [score, box, graph.Div(flat, float(stride))]}
    for size in (8, 16):
        nothing = graph.Mul(pool(green, size), 0.0)
        rows[size] = [graph.Concat(*[nothing] * count, axis=1) for count in (1, 4, 10)]
    outputs = {}
    for part, width in enumerate((1, 4, 10)):
        for size in (8, 16, 32):
            cells = graph.Transpose(graph.Reshape(rows[size][part], [width, 1, -1]), perm=[2, 1, 0])
            both = graph.Reshape(graph.Tile(cells, [1, 2, 1]), [-1, width])
            name = f"out_{part}_{size}"
            graph.nodes.append(helper.make_node("Identity", [both], [name], name=name))
            outputs[name] = [f"rows_{part}_{size}", width]
    graph.save(path, [1, 3, "height", "width"], outputs)


def fit_matrix() -> np.ndarray:
    """(68, 5) from five points to 68: the affine image of the mean face, with the five exactly where they are."""
    with_one = [np.column_stack([points, np.ones(len(points))]) for points in (mean_68, mean_five)]
    matrix = with_one[0] @ np.linalg.pinv(with_one[1])
    for row, places in enumerate(PLACES):
        matrix[places] += np.eye(5)[row] - matrix[places].mean(0)
    return matrix


def make_landmarks(path: Path) -> None:
    """landmark_3d_68: 192 x 192 to 3309 numbers, of which InsightFace takes the last 68 points."""
    graph, size = Graph(), 192
    weights, green = disc_weights(graph)
    place = np.arange(size, dtype=np.float32)
    mass = graph.Add(graph.ReduceSum(weights, [2, 3], keepdims=0), 1e-6)
    x, y, depth = (
        graph.Div(graph.ReduceSum(graph.Mul(weights, value), [2, 3], keepdims=0), mass)
        for value in (place.reshape(1, 1, 1, size), place.reshape(1, 1, size, 1), green)
    )
    across = [graph.ReduceSum(graph.Mul(value, EYES_TO_MOUTH[None]), [1], keepdims=1) for value in (x, y)]
    length = graph.Sqrt(graph.Add(*(graph.Mul(a, a) for a in across)))
    z = graph.Mul(graph.Div(graph.Sub(depth, 128.0), DEPTH_CODE), length)
    half = size / 2
    scaled = graph.Sub(graph.Div(x, half), 1.0), graph.Sub(graph.Div(y, half), 1.0), graph.Div(z, half)
    five = graph.Transpose(graph.Concat(*scaled, axis=0), perm=[1, 0])  # (5, 3)
    last = graph.Reshape(graph.MatMul(fit_matrix(), five), [1, 204])
    graph.nodes.append(
        helper.make_node("Concat", [graph.constant(np.zeros((1, 3105))), last], ["fc1"], axis=1, name="n")
    )
    graph.save(path, [1, 3, size, size], {"fc1": [1, 3309]})


def make_recogniser(path: Path, width: int) -> None:
    """ArcFace: 112 x 112 to width numbers, not normalised."""
    graph = Graph()
    blocks = graph.Flatten(graph.AveragePool("input.1", kernel_shape=[8, 8], strides=[8, 8]))
    matrix = np.random.default_rng(0).normal(0, 1, (3 * 14 * 14, width))
    graph.nodes.append(helper.make_node("MatMul", [blocks, graph.constant(matrix)], ["683"], name="n"))
    graph.save(path, ["None", 3, 112, 112], {"683": [1, width]})


def make_pack(root: Path, name: str = "buffalo_l", width: int = 512, landmarks: bool = True) -> Path:
    """A model pack under root, with the file names of buffalo_l. Returns its folder."""
    folder = root / "models" / name
    folder.mkdir(parents=True)
    make_detector(folder / "det_10g.onnx")
    make_recogniser(folder / "w600k_r50.onnx", width)
    if landmarks:
        make_landmarks(folder / "1k3d68.onnx")
    return folder
