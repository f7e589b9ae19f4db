"""A small encoder trained without labels on the source and the references (our choice): it needs no weights of others.

Two views of an image (crop, flip) are pulled together and apart from other images' views: NT-Xent of SimCLR (arXiv 2002.05709, eq. 1).
Colour jitter and blur, SimCLR's strongest augmentations, are left out: an encoder that they made blind to colour and sharpness
could not tell one camera from another.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from alignflow_core.config import Training
from alignflow_core.flow.train import train
from alignflow_core.reward.encoders import Encoder, Material
from alignflow_core.seeding import derive_seed, generator

TRAINING = Training(steps=200, batch=64, lr=2e-3, warm_up=20, ema=0.98, save_every=50, log_every=50)
CHANNELS = (24, 48, 96)
TEMPERATURE = 0.2


class SelfSupervised(Encoder):
    """Three convolution blocks, each of half the resolution; their outputs are the maps."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *CHANNELS)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU(), nn.Conv2d(b, b, 3, stride=2, padding=1), nn.SiLU())
            for a, b in zip(widths[:-1], widths[1:], strict=True))

    def maps(self, images: Tensor) -> list[Tensor]:
        """See :class:`Encoder`."""
        found = []
        x = images
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found


class _Contrast(nn.Module):
    """Encoder and projection head, trained together; the head is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SelfSupervised()
        self.head = nn.Sequential(nn.Linear(CHANNELS[-1], 64), nn.SiLU(), nn.Linear(64, 32))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> directions [B, 32]."""
        return functional.normalize(self.head(self.encoder.maps(images)[-1].mean((2, 3))), dim=1)


def build(material: Material) -> SelfSupervised:
    """Train the encoder on source and references; of each batch a quarter are references, or all there are where they are fewer than that."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(material.seed, "ssl", "weights"))
        model = _Contrast().to(material.source.device)

    def step(i: int) -> dict[str, float]:
        draw = generator(material.seed, "ssl", i)
        n_references = min(TRAINING.batch // 4, len(material.references))
        own = torch.randint(len(material.source), (TRAINING.batch - n_references,), generator=draw)
        theirs = torch.randperm(len(material.references), generator=draw)[:n_references]
        images = torch.cat([material.source[own.to(material.source.device)], material.references[theirs.to(material.references.device)]])
        loss = nt_xent(model(_view(images, draw)), model(_view(images, draw)), TEMPERATURE)
        loss.backward()
        return {"loss": loss.item()}

    weights = train(model, step, TRAINING, material.work_dir / "ssl.safetensors", lambda metrics, i: None, lambda done, total, note: None).shadow
    model.load_state_dict(weights)
    return model.encoder


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Mean over all 2B views of -log softmax of the partner's similarity among all other views; directions a and b [B, D]."""
    views = torch.cat([a, b])
    similarity = (views @ views.T / temperature).masked_fill(torch.eye(len(views), dtype=torch.bool, device=a.device), float("-inf"))
    partner = torch.arange(len(views), device=a.device).roll(len(a))
    return functional.cross_entropy(similarity, partner)


def _view(images: Tensor, draw: torch.Generator) -> Tensor:
    """A random crop of 50 to 100 % of the side, flipped at random, at the old size."""
    n = len(images)
    scale = 0.5 + 0.5 * torch.rand(n, generator=draw)
    centre = (1 - scale)[:, None] * (2 * torch.rand(n, 2, generator=draw) - 1)
    flip = torch.randint(0, 2, (n, 2), generator=draw) * 2 - 1
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * flip[:, 0], scale * flip[:, 1], centre
    grid = functional.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)
