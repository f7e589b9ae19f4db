"""The open sets of stage 2: names as ``params.yaml`` spells them -> ``module:object`` of this package.

A new distance or encoder is one file and one line here (``docs/extending.md``). Standard library only: names are checked without
torch, and an aligned checkpoint depends on the file of its own distance and encoder, not on those of others.
"""

DISTANCES = {
    "frechet": "reward.distances:frechet",
    "skl": "reward.distances:skl",
    "gaussian_skl": "reward.distances:gaussian_skl",
    "coral": "reward.distances:coral",
    "gram": "reward.distances:gram",
    "cosine": "reward.distances:cosine",
    "mmd": "reward.distances:mmd",
    "sliced_wasserstein": "reward.distances:sliced_wasserstein",
}
# Distances that need the references' means and deviations alone, and encoders that need no reference images to be built: what a
# reference set of moments can be aligned with (``reference_kit.py``).
FROM_MOMENTS = ("frechet", "gaussian_skl", "skl", "cosine")
PORTABLE_ENCODERS = ("statconv", "flow")

ENCODERS = {
    "statconv": "reward.statconv:build",
    "flow": "reward.flow_features:build",
    "ssl": "reward.self_supervised:build",
    "pretrained": "reward.pretrained:build",
}
