"""The explorers: a head to turn, voxels to look into, attention to compare, and a training run to watch.

    from viewdiff_nb.widgets import PoseExplorer
    PoseExplorer(model, test)                  # in a notebook cell
    PoseExplorer(model, test).figure()         # the same as a static figure

All of them work in JupyterLab 4 and Notebook 7, by mouse and by keyboard.
"""

from viewdiff_nb.widgets.attention import AttentionExplorer
from viewdiff_nb.widgets.monitor import TrainingMonitor
from viewdiff_nb.widgets.pose import PoseExplorer
from viewdiff_nb.widgets.voxel import VoxelExplorer

__all__ = ["AttentionExplorer", "PoseExplorer", "TrainingMonitor", "VoxelExplorer"]
