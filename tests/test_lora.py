"""Low-rank adapters on the velocity U-Net."""

import torch

from alignflow_core.config import Network
from alignflow_core.networks import lora, velocity_unet

NETWORK = Network(channels=(8, 16), attention=(False, True), head_channels=8)


def test_adapters_start_as_the_base_train_few_weights_and_merge() -> None:
    base, model = (velocity_unet.build(3, 2, NETWORK, seed=0) for _ in range(2))
    lora.adapt(model, 2, seed=1, free=(model.unet.class_embedding,))
    x, t, cond = torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 2, 16, 16)
    with torch.no_grad():
        assert torch.allclose(model(x, t, cond), base(x, t, cond), atol=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("parametrizations" in name or "class_embedding" in name for name in trained)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert n_trained < 0.35 * sum(p.numel() for p in base.parameters())
    # Outputs of a fresh U-Net are zero whatever is below: its last layer starts at zero.
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (model(x, t, cond, domain=1) - 1).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        adapted = model(x, t, cond, domain=1)
        lora.merge(model)
        assert torch.allclose(model(x, t, cond, domain=1), adapted, atol=1e-5) and not torch.allclose(adapted, base(x, t, cond), atol=1e-3)
    base.load_state_dict(model.state_dict())  # a plain network again
