"""A study of toy size."""

from dataclasses import replace

from conftest import people

from viewdiff_nb.faces import Split, split_by_person
from viewdiff_nb.studies.adaptation import COMMON, Profile

TOY = replace(COMMON, d_model=32, nhead=4, num_layers=2, dim_feedforward=48, voxel_resolution=4)
TINY = Profile(
    "tiny",
    base_epochs=1,
    adapt_epochs=1,
    small_epochs=1,
    baseline_epochs=1,
    common=TOY,
)
"""One seed, one epoch of everything."""

SAME_MASKS = replace(TINY, common=replace(TOY, dropout=0.0))
"""Runs of one pass draw their own dropout masks: without any they are those of runs alone."""


def small_split(noise: float = 0.3) -> Split:
    return split_by_person(people(110, views=12, noise=noise), val=40, test=40)
