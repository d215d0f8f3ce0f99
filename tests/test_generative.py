"""FID, KID, precision and recall against their formulas in float64, and the classifier whose features they take."""

import numpy as np
import pytest
import torch

from sslfast.evaluation import generative
from sslfast.training import UserError, data


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|μa - μb|² + tr(Ca + Cb - 2 (Ca Cb)^½), the root's trace from the eigenvalues of the symmetric form."""
    ca, cb = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(ca)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cb @ root).clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * cross


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def own(x):
        k, n = kernel(x, x), len(x)
        return (k.sum() - np.trace(k)) / (n * (n - 1))

    return own(a) + own(b) - 2 * kernel(a, b).mean()


def test_fid_and_kid_are_their_formulas():
    random = np.random.default_rng(0)
    real = random.normal(size=(400, 6))
    mixed = random.normal(size=(6, 6)) * 0.2 + np.eye(6)
    generated = random.normal(size=(400, 6)) @ mixed + 0.5
    found = generative.compare(torch.from_numpy(real).float(), torch.from_numpy(generated).float())
    assert found["fid"] == pytest.approx(frechet(real, generated), rel=1e-4)
    # Subsets of all 400 images are the images themselves, in another order.
    assert found["kid"] == pytest.approx(kernel_distance(real, generated), rel=1e-3)
    again = generative.compare(torch.from_numpy(real).float(), torch.from_numpy(generated).float())
    assert again == found


def test_comparing_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    generative.compare(torch.zeros(5, 2) + torch.arange(5.0)[:, None], torch.ones(5, 2))
    assert torch.equal(torch.rand(1), expected)


def test_precision_and_recall_of_cases_that_one_can_count():
    # Real: two clusters on a line. Generated: one of them, twice as many points, and a point in no man's land.
    real = torch.tensor([[0.0], [1], [2], [3], [100], [101], [102], [103]])
    generated = torch.tensor([[0.5], [1.5], [2.5], [0.1], [50]])
    assert generative.precision_recall(real, generated, k=2) == (pytest.approx(0.8), pytest.approx(0.5))
    assert generative.precision_recall(real, real, k=2) == (1.0, 1.0)
    assert generative.precision_recall(real, real + 1000, k=2) == (0.0, 0.0)


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="k=3"):
        generative.precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="at least 4"):
        generative.compare(torch.zeros(3, 2), torch.zeros(9, 2))


def test_the_classifier_is_trained_once_and_kept(tmp_path):
    train, test = data.load("digits", "train"), data.load("digits", "test")
    path = tmp_path / "kept" / "classifier.safetensors"
    model, accuracy = generative.feature_classifier(path, train, test, 16)
    assert accuracy > 95
    logits, _ = generative.over_images(lambda x: model(x.float() / 127.5 - 1), test, 16, torch.arange(len(test)))
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == test.labels).float().mean().item(), abs=0.01)
    again, same = generative.feature_classifier(path, train, test, 16)
    assert same == pytest.approx(accuracy, abs=0.01)
    pixels = test.source[:10]
    features = generative.over_pixels(generative.classifier_features(again), pixels)
    assert features.shape == (10, generative.FEATURES)
    assert torch.equal(features, generative.over_pixels(generative.classifier_features(model), pixels))
    with pytest.raises(UserError, match="other images"):
        generative.feature_classifier(path, train, test, 32)


def test_the_classifier_on_a_device(cuda_device, tmp_path):
    train, test = (data.load("digits", split) for split in ("train", "test"))
    model, accuracy = generative.feature_classifier(tmp_path / "c", train, test, 16, "cuda")
    assert accuracy > 80
    features, _ = generative.over_images(generative.classifier_features(model, "cuda"), test, 16, torch.arange(10))
    assert (features.shape, features.device.type) == ((10, 128), "cpu")


def test_unlabelled_images_cannot_train_a_classifier(tmp_path):
    train, test = data.load("digits", "train"), data.load("digits", "test")
    train.labels[:] = -1
    with pytest.raises(UserError, match="inception"):
        generative.feature_classifier(tmp_path / "c", train, test, 16)


def test_inception_without_its_weights_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        generative.inception_features(tmp_path / "weights.pth")
