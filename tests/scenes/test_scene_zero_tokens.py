"""One token with a bias stands for T5's 256 zeros: the same outputs and gradients as the stock network's."""

import torch

from train_denoiser import build_denoiser
from zero_tokens import NUM_ZEROS, use_one_zero, with_one_zero


def test_one_zero_gives_the_outputs_and_gradients_of_256():
    generator = torch.Generator().manual_seed(0)
    x, context, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 8, 16, 16), (2, 9, 192), (2, 192)))
    results = []
    for one in (False, True):
        denoiser = build_denoiser()
        torch.manual_seed(1)
        for parameter in denoiser.parameters():  # the stock start has zeros where a difference would not show
            torch.nn.init.normal_(parameter, std=0.05)
        if one:
            use_one_zero(denoiser)
        tokens = with_one_zero(context) if one else torch.nn.functional.pad(context, (0, 0, 0, NUM_ZEROS))
        out = denoiser(
            hidden_states=x,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=torch.tensor([300.0, 900.0]),
            return_dict=False,
        )[0]
        out.square().mean().backward()
        results.append([out, denoiser.context_embedder.bias.grad, denoiser.proj_out.weight.grad])
    for stock, ours in zip(*results, strict=True):
        assert stock.std() > 1e-5
        torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-4 * stock.abs().max().item())
