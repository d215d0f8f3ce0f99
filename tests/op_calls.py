"""A call of every op, for tests of what holds for all of them."""

import torch

from sslfast.ops import (
    diffusion_loss,
    diffusion_noise,
    diffusion_step,
    group_norm_silu,
    nt_xent,
    q_sample,
    rotate4,
    sigmoid_loss,
    similarity_lse,
)

Q, K = torch.randn(2, 9, 7, generator=torch.Generator().manual_seed(0))
X, Y = torch.randn(2, 3, 6, 5, 5, generator=torch.Generator().manual_seed(1))
SCALE, BIAS, WEIGHT = torch.tensor(3.0), torch.tensor([-2.0]), torch.linspace(-1, 2, 6)
T, ALPHAS, SEEDS = torch.tensor([1, 0, 7]), torch.linspace(0.99, 0.01, 10), torch.arange(3)
EXCLUDE, STEP = torch.arange(9), torch.linspace(0.1, 1.2, 12)

# name: (the op, the inputs that may need a gradient)
CALLS = {
    "nt_xent": (nt_xent, [Q, K, SCALE]),
    "similarity_lse": (similarity_lse, [Q, K, SCALE]),
    "similarity_lse bfloat16": (similarity_lse, [Q.bfloat16(), K.bfloat16(), SCALE]),
    "similarity_lse of number": (lambda q, k: similarity_lse(q, k, 3.0, exclude=EXCLUDE), [Q, K]),
    "similarity_lse self": (lambda q, s: similarity_lse(q, None, s), [Q, SCALE]),
    "similarity_lse columns": (lambda *t: similarity_lse(*t, columns=True), [Q, K, SCALE]),
    "similarity_lse a column": (lambda *t: similarity_lse(*t, columns=True)[1], [Q, K, SCALE]),
    "sigmoid_loss": (sigmoid_loss, [Q, K, SCALE, BIAS]),
    "sigmoid_loss float64": (sigmoid_loss, [Q.double(), K.double(), SCALE, BIAS]),
    "group_norm_silu": (lambda x, w, b: group_norm_silu(x, 3, w, b), [X, WEIGHT, WEIGHT.flip(0)]),
    "group_norm_silu bfloat16": (lambda x, w, b: group_norm_silu(x, 3, w, b), [X.bfloat16(), WEIGHT, WEIGHT]),
    "group_norm_silu bias": (lambda x, b: group_norm_silu(x, 3, None, b), [X, WEIGHT]),
    "diffusion_loss": (lambda a, b: diffusion_loss(a, b, T, ALPHAS, snr_gamma=5.0), [X, Y]),
    "diffusion_loss none": (lambda a, b: diffusion_loss(a, b, T, ALPHAS, reduction="none"), [X, Y]),
    "rotate4": (rotate4, [X]),
    "q_sample": (lambda x, noise: q_sample(x, T, ALPHAS, noise=noise), [X, Y]),
    "diffusion_step": (lambda a, b: diffusion_step(a, b, STEP, seeds=SEEDS), [X, Y]),
    "diffusion_noise": (lambda: diffusion_noise(SEEDS, (6, 5), step=4), []),
}
