"""The open sets that painters are composed of: names as ``params.yaml`` spells them -> ``module:object`` of this package.

A painter draws an image from a mask. It is a *process* (how noise becomes data), a *conditioner* (how the network is told the mask)
and an *objective* (what training lowers). A new one of each kind is one file and one line here (``docs/comparators.md``).
Standard library only, so that names are checked without torch.
"""

PROCESSES = {
    "flow": "painters.flow:Flow",
    "diffusion": "painters.diffusion:Diffusion",
}
CONDITIONERS = {
    "concat": "painters.concat:build",
    "controlnet": "painters.controlnet:build",
    "dense_controlnet": "painters.controlnet:build_dense",
    "t2i_adapter": "painters.t2i_adapter:build",
    "spade": "painters.spade:build",
}
OBJECTIVES = {
    "denoise": "painters.denoise:loss",
    "siamese": "painters.siamese:loss",
}
ON_A_FROZEN_BASE = ("controlnet", "dense_controlnet", "t2i_adapter")  # these add to an unconditional painter, and train at most its decoder
