"""The same small grid gives the same table where a joblib backend of a cluster trains it."""

from contextlib import contextmanager

import joblib
import pandas as pd
import pytest
import ray
from distributed import Client
from joblib.pool import PicklingPool
from ray.util.joblib import register_ray
from studies_fixture import TINY, small_split
from test_ablation import COLUMNS, GRID

from viewdiff_nb.studies.ablation import run_grid
from viewdiff_nb.studies.store import Store


@contextmanager
def dask_cluster():
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None), joblib.parallel_config("dask"):
        yield


@contextmanager
def ray_cluster():
    bases = PicklingPool.__bases__  # which ray replaces by its own pool: "multiprocessing" would then be ray, too
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    register_ray()
    try:
        with joblib.parallel_config("ray", n_jobs=-1):
            yield
    finally:
        ray.shutdown()
        PicklingPool.__bases__ = bases


@pytest.mark.parametrize("cluster", [dask_cluster, ray_cluster])
def test_a_cluster_gives_the_same_table(tmp_path, cluster):
    split = small_split()
    one = run_grid(GRID, split, TINY, workers=1, store=Store(split, tmp_path / "here"))
    with cluster():
        other = run_grid(GRID, split, TINY, store=Store(split, tmp_path / "there"))
    assert (other["error"] == "").all(), other["error"].tolist()
    pd.testing.assert_frame_equal(one[COLUMNS], other[COLUMNS], atol=5e-3)
