"""kNN against scikit-learn and brute force, the linear probe against scikit-learn, and the pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from sslfast.evaluation import linear, neighbours, plots


def clusters(count: int, seed: int, spread: float = 1.5, classes: int = 5, dimensions: int = 12):
    centres = torch.randn(classes, dimensions, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, dimensions, generator=generator), labels


@pytest.mark.parametrize("chunk", [1, 977, 1 << 24])
def test_nearest_is_brute_force(monkeypatch, chunk):
    monkeypatch.setattr(neighbours, "CHUNK_ELEMENTS", chunk)
    queries, keys = torch.randn(53, 7), torch.randn(211, 7)
    similarity, index = neighbours.nearest(queries, keys, 9)
    a, b = queries.double().numpy(), keys.double().numpy()
    cosine = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    np.testing.assert_array_equal(index, np.argsort(-cosine, axis=1)[:, :9])
    np.testing.assert_allclose(similarity, -np.sort(-cosine, axis=1)[:, :9], atol=1e-6)


def test_knn_accuracy_is_that_of_scikit_learn():
    train, train_labels = clusters(600, seed=1)
    test, test_labels = clusters(400, seed=2)
    accuracy = neighbours.knn_accuracy(train, train_labels, test, test_labels, ks=(1, 10, 200))
    assert 40 < accuracy[10] < 95, "the case must be neither trivial nor hopeless"
    for k, ours in accuracy.items():
        peer = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.1))
        expected = 100 * peer.fit(train, train_labels).score(test, test_labels)
        assert ours == pytest.approx(expected, abs=1e-3)


def test_votes_are_weighted_by_similarity():
    similarity = torch.tensor([[0.9, 0.5, 0.5], [0.9, 0.88, 0.88]])
    labels = torch.tensor([[1, 0, 0], [1, 0, 0]])
    assert neighbours.vote(similarity, labels, classes=2).tolist() == [1, 0]


@pytest.mark.parametrize("k", [0, 4])
def test_k_must_fit(k):
    with pytest.raises(ValueError, match="k must be between 1 and the 3 keys"):
        neighbours.nearest(torch.ones(2, 2), torch.ones(3, 2), k)


@pytest.mark.parametrize("l2", [1e-3, 1e-2])
def test_logistic_regression_is_that_of_scikit_learn(l2):
    features, labels = clusters(700, seed=3)
    weight, bias = linear.fit_logistic_regression(features, labels, 5, l2)
    peer = LogisticRegression(C=1 / (l2 * len(features)), tol=1e-8, max_iter=5000).fit(features.double(), labels)
    np.testing.assert_allclose(weight, peer.coef_, atol=5e-3)

    def objective(w, b):
        cross_entropy = torch.nn.functional.cross_entropy(features.double() @ w.double().T + b.double(), labels)
        return (cross_entropy + l2 / 2 * w.double().square().sum()).item()

    least = objective(torch.tensor(peer.coef_), torch.tensor(peer.intercept_))
    assert objective(weight, bias) == pytest.approx(least, rel=2e-6)


def test_linear_probe_with_a_given_penalty_is_scikit_learn_on_standardised_features():
    (train, train_labels), (test, test_labels) = clusters(900, seed=4), clusters(500, seed=5)
    scale = torch.logspace(-4, 4, 12)
    mean, deviation = train.mean(0), train.std(0)
    peer = LogisticRegression(C=1.0, max_iter=5000).fit((train - mean) / deviation, train_labels)
    expected = 100 * peer.score((test - mean) / deviation, test_labels)
    ours = linear.linear_probe(train * scale, train_labels, test * scale, test_labels, l2=1 / 900)
    assert ours == pytest.approx(expected, abs=0.21)


@pytest.mark.parametrize("case", ["hidden signal", "few samples"])
def test_linear_probe_chooses_the_penalty_that_generalises(case):
    """A strong penalty misses a signal in the small differences of features; a weak one memorises few samples."""
    generator = torch.Generator().manual_seed(0)
    count, dimensions = (3000, 50) if case == "hidden signal" else (500, 200)
    labels = torch.randint(5, (count + 2000,), generator=generator)
    features = torch.randn(len(labels), dimensions, generator=generator)
    features[:, :5] += 1.5 * torch.nn.functional.one_hot(labels)
    if case == "hidden signal":
        features = torch.randn(len(labels), 1, generator=generator) + 0.05 * features
    sets = (features[:count], labels[:count], features[count:], labels[count:])
    given = [linear.linear_probe(*sets, l2) for l2 in linear.L2]
    assert max(given) - min(given) > 2, "the penalty must matter in this case"
    assert linear.linear_probe(*sets) > max(given) - 2


def test_linear_probe_ignores_constant_features_and_finds_what_is_separable():
    easy, labels = clusters(300, seed=6, spread=0.05)
    constant = torch.cat([easy, torch.full((300, 1), 7.0)], 1)
    assert linear.linear_probe(constant, labels, constant, labels) == 100


def test_pictures_are_drawn(tmp_path):
    lines = [{"step": s, "epoch": 1 + s // 50, "loss": 5 - s / 100, "lr": 0.1} for s in range(10, 101, 10)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 110, "epo')  # as a killed run leaves it
    features, labels = clusters(120, seed=7)
    plots.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    plots.embedding_map(features, labels, list("abcde"), tmp_path / "map.png")
    for channels in (1, 3):
        images = torch.randint(0, 256, (2, 6, channels, 9, 9), dtype=torch.uint8)
        plots.neighbour_sheet(
            images[:, 0], labels[:2], images[:, 1:], labels[2:12].reshape(2, 5), list("abcde"), tmp_path / "sheet.png"
        )
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert min(sheet.size) > 200
            assert np.ptp(np.asarray(sheet.convert("L"))) > 200
    for name in ("loss.png", "map.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 400
            assert np.ptp(np.asarray(picture.convert("L"))) > 150
    assert not list(tmp_path.glob("*.unfinished"))
