"""The linear probe: multinomial logistic regression on frozen features."""

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_logistic_regression(
    features: Tensor, labels: Tensor, classes: int, l2: float | None = None, iterations: int = 300
) -> tuple[Tensor, Tensor]:
    """Return (weight (classes, D), bias (classes)) that minimise the mean cross-entropy + l2/2·|weight|², by LBFGS.

    features (N, D) float, labels (N,) int64. ``l2`` is 1/N by default: scikit-learn's LogisticRegression with C=1.
    """
    l2 = 1 / len(features) if l2 is None else l2
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
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
    """Return the test accuracy in percent of logistic regression on features standardised by the training set."""
    deviation, mean = torch.std_mean(train, dim=0)
    deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, 1.0)
    classes = int(train_labels.max()) + 1
    weight, bias = fit_logistic_regression((train - mean) / deviation, train_labels, classes, l2)
    predicted = F.linear((test - mean) / deviation, weight, bias).argmax(1)
    return 100 * (predicted == test_labels).float().mean().item()
