"""The linear probe: multinomial logistic regression on frozen features."""

import torch
import torch.nn.functional as F
from torch import Tensor

L2 = (1e-1, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)  # the penalties among which the probe chooses, strongest first


def fit_logistic_regression(
    features: Tensor,
    labels: Tensor,
    classes: int,
    l2: float,
    start: tuple[Tensor, Tensor] | None = None,
    iterations: int = 300,
) -> tuple[Tensor, Tensor]:
    """Return (weight (classes, D), bias (classes)) that minimise the mean cross-entropy + l2/2·|weight|², by LBFGS.

    features (N, D) float, labels (N,) int64. scikit-learn's C is 1 / (N·l2). ``start`` is where to begin, by default 0.
    """
    weight, bias = start or (features.new_zeros(classes, features.shape[1]), features.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, l2: float | None = None
) -> float:
    """Return the test accuracy in percent of logistic regression on features standardised by the training set.

    Unless ``l2`` is given, each representation is judged by the penalty that suits it: the best of ``L2`` on a fifth of
    the training set (at most 10,000 samples), held out of fits on the rest; of fewer than 5 samples, the middle one.
    """
    classes = int(train_labels.max()) + 1
    deviation, mean = torch.std_mean(train, dim=0, correction=min(1, len(train) - 1))
    deviation = torch.where(deviation > 0, deviation, 1.0)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    solution = None
    if l2 is None:
        l2, solution = _choose_l2(train, train_labels, classes)
    weight, bias = fit_logistic_regression(train, train_labels, classes, l2, solution)
    return _accuracy(test, test_labels, weight, bias)


def _choose_l2(features: Tensor, labels: Tensor, classes: int) -> tuple[float, tuple[Tensor, Tensor]]:
    """Walk from the strongest penalty to the weakest, each fit starting at the last, until the accuracy falls."""
    if len(features) < 5:
        return L2[len(L2) // 2], fit_logistic_regression(features, labels, classes, L2[len(L2) // 2])
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    held_out, fitted = order.split([min(10_000, len(order) // 5), len(order) - min(10_000, len(order) // 5)])
    known, known_labels = features[fitted], labels[fitted]
    solution, fits = None, []
    for l2 in L2:
        solution = fit_logistic_regression(known, known_labels, classes, l2, solution, iterations=60)
        fits.append((_accuracy(features[held_out], labels[held_out], *solution), l2, solution))
        if fits[-1][0] < max(fit[0] for fit in fits) - 0.2:
            break
    _, l2, solution = max(fits, key=lambda fit: fit[0])
    return l2, solution


def _accuracy(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> float:
    return 100 * (F.linear(features, weight, bias).argmax(1) == labels).float().mean().item()
