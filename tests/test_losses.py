"""The losses against the libraries whose signatures they have, and in float64 against gradcheck."""

import math
import warnings

import info_nce
import lightly.loss
import open_clip.loss
import pytest
import pytorch_metric_learning.losses
import torch
from torch import Tensor

from sslfast import losses
from sslfast.losses._common import normalize

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def views(batch: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views that agree in part, as in training."""
    generator = torch.Generator().manual_seed(seed + 1000 * batch + dim)
    z, noise = torch.randn(2, batch, dim, generator=generator, dtype=torch.float64)
    return z.to(dtype), (z + noise).to(dtype)


def unit(*tensors: Tensor) -> list[Tensor]:
    return [torch.nn.functional.normalize(t.double(), dim=1).to(t.dtype) for t in tensors]


def loss_and_grads(loss, *inputs, **options) -> list[Tensor]:
    """The loss and the gradients of those inputs that are floating-point tensors."""
    leaves = [t.clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    value = loss(*leaves, **options)
    weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view(value.shape).to(value.dtype)
    leaves = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    grads = torch.autograd.grad(value, leaves, weights, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True))]


def check_equal(ours, theirs, *inputs, rtol=2e-5, **options) -> None:
    """Ours on the inputs as they are, theirs on the same numbers in float64."""
    actual = loss_and_grads(ours, *inputs, **options)
    double = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightly makes tensors of tensors
        expected = loss_and_grads(theirs, *double, **options)
    assert actual[0].dtype == (torch.float64 if inputs[0].dtype == torch.float64 else torch.float32)
    rough = inputs[0].dtype == torch.bfloat16
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        limit = rtol if number == 0 or not rough else 1e-2
        assert (a.double() - e).norm() <= limit * max(e.norm().item(), 1e-3), (number, a, e)
    assert [a.dtype for a in actual[1:]] == [t.dtype for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]


# InfoNCE


@pytest.mark.parametrize("negatives", [None, "unpaired", "paired"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_info_nce_equals_info_nce_pytorch(negatives, reduction, dtype):
    query, positive = views(20, 12, dtype)
    options = {"temperature": 0.2, "reduction": reduction, "negative_mode": negatives or "unpaired"}
    shape = {None: None, "unpaired": (70, 12), "paired": (20, 6, 12)}[negatives]
    negative = () if shape is None else (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype),)
    check_equal(losses.InfoNCE(**options), info_nce.InfoNCE(**options), query, positive, *negative)


def test_info_nce_with_a_queue_that_needs_no_gradient():
    query, positive = views(40, 24)
    queue = torch.randn(3000, 24)
    check_equal(
        lambda q, k: losses.InfoNCE(0.07)(q, k, queue),
        lambda q, k: info_nce.InfoNCE(0.07)(q, k, queue.double()),
        query,
        positive,
    )


def test_small_losses_keep_their_digits():
    """The positive is not among what is summed, so that 1e-12 does not drown in the digits of 1."""
    query = torch.eye(8, 8)
    expected = info_nce.InfoNCE(0.03)(query.double(), query.double())
    assert expected < 1e-12
    assert losses.InfoNCE(0.03)(query, query).item() == pytest.approx(expected.item(), rel=1e-4)


# CLIP and SigLIP


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("batch", [1, 33, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_equals_open_clip(dtype, batch, scale):
    images, texts = unit(*views(batch, 20, dtype))
    check_equal(losses.ClipLoss(), open_clip.loss.ClipLoss(), images, texts, torch.tensor(scale))


def test_clip_bias_and_dictionary():
    images, texts = unit(*views(30, 20))
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0, requires_grad=True)
    found = losses.ClipLoss()(images, texts, scale, logit_bias=bias, output_dict=True)
    expected = open_clip.loss.ClipLoss()(images, texts, scale, bias, output_dict=True)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["contrastive_loss"], expected["contrastive_loss"])
    found["contrastive_loss"].backward()
    assert bias.grad == 0
    torch.testing.assert_close(losses.ClipLoss()(images, texts, 10.0), expected["contrastive_loss"])


@pytest.mark.parametrize("batch", [1, 33, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_siglip_equals_open_clip(dtype, batch):
    images, texts = unit(*views(batch, 20, dtype))
    scale, bias = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    check_equal(losses.SigLipLoss(), open_clip.loss.SigLipLoss(), images, texts, scale, bias)


def test_siglip_without_bias_and_as_dictionary():
    images, texts = unit(*views(30, 20))
    found = losses.SigLipLoss()(images, texts, 10.0, output_dict=True)["contrastive_loss"]
    torch.testing.assert_close(found, open_clip.loss.SigLipLoss()(images, texts, 10.0, None))


# SupCon


def supcon_cases():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (60,), generator=generator)
    some = torch.randint(0, 8, (45,), generator=generator)  # two labels that no embedding has
    reference = torch.randn(45, 12, generator=generator, dtype=torch.float64)
    other_views = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    pairs = torch.randint(0, 60, (4, 50), generator=generator)
    positive = labels[pairs[0]] == labels[pairs[1]]
    negative = labels[pairs[2]] != labels[pairs[3]]
    pairs = (pairs[0][positive], pairs[1][positive], pairs[2][negative], pairs[3][negative])
    triplets = tuple(t[: min(map(len, pairs))] for t in (pairs[0], pairs[1], pairs[3]))
    triplets = tuple(t[labels[triplets[0]] != labels[triplets[2]]] for t in triplets)
    return {
        "labels": {"labels": labels},
        "rows without positives": {"labels": torch.cat([labels[:40], torch.arange(100, 120)])},
        "one label": {"labels": torch.ones(60, dtype=torch.int64)},
        "all different": {"labels": torch.arange(60)},
        "float labels": {"labels": labels.double() / 3},
        "ref": {"labels": labels, "ref_emb": reference, "ref_labels": some},
        "ref without common label": {"labels": labels, "ref_emb": reference, "ref_labels": some + 100},
        "other views": {"labels": labels, "ref_emb": other_views},
        "pairs": {"labels": labels, "indices_tuple": pairs},
        "triplets": {"indices_tuple": triplets},
    }


@pytest.mark.parametrize("case", supcon_cases())
@pytest.mark.parametrize("dtype", DTYPES)
def test_supcon_equals_pytorch_metric_learning(case, dtype):
    options = supcon_cases()[case]
    embeddings, _ = views(60, 12, dtype)
    theirs, ours = pytorch_metric_learning.losses.SupConLoss(0.2), losses.SupConLoss(0.2)
    reference = options.pop("ref_emb", None)
    inputs = (embeddings,) if reference is None else (embeddings, reference.to(dtype))

    def call(loss):
        return lambda z, r=None: loss(z, ref_emb=r, **options)

    check_equal(call(ours), call(theirs), *inputs)


@pytest.mark.parametrize("labels", [[0], [0, 0], [0, 1], [0, 0, 1]])
def test_supcon_of_tiny_batches(labels):
    labels = torch.tensor(labels)
    embeddings, reference = views(len(labels), 5, torch.float64)
    theirs, ours = pytorch_metric_learning.losses.SupConLoss(), losses.SupConLoss()
    torch.testing.assert_close(ours(embeddings, labels), theirs(embeddings, labels))
    few = {"ref_emb": reference, "ref_labels": labels.flip(0)}
    torch.testing.assert_close(ours(embeddings[:1], labels[:1], **few), theirs(embeddings[:1], labels[:1], **few))


# DCL, DCLW, NT-Xent with a memory bank


@pytest.mark.parametrize("batch", [2, 31, 130])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["DCLLoss", "DCLWLoss"])
def test_dcl_equals_lightly(name, dtype, batch):
    ours, theirs = getattr(losses, name)(0.2), getattr(lightly.loss.dcl_loss, name)(0.2)
    check_equal(ours, theirs, *views(batch, 20, dtype))


def test_dcl_weights():
    z1, z2 = views(20, 8)

    def weights(a, b):
        return 1 + (a[:, 0] * b[:, 1]).detach()

    check_equal(losses.DCLLoss(0.3, weights), lightly.loss.DCLLoss(0.3, weights), z1, z2)


def test_memory_bank_equals_lightly():
    ours, theirs = losses.NTXentLoss(0.2, (48, 10)), lightly.loss.NTXentLoss(0.2, (48, 10))
    theirs.memory_bank.bank.copy_(ours.bank)
    for step in range(7):  # of 16: the bank is filled twice
        z1, z2 = views(16, 10, seed=step)
        check_equal(ours, lambda a, b: theirs(a.float(), b.float()), z1, z2, rtol=1e-5)
    torch.testing.assert_close(ours.bank, theirs.memory_bank.bank)


def test_memory_bank_wraps_around():
    loss = losses.NTXentLoss(0.2, (10, 4))
    seen = []
    for step in range(3):
        z1, z2 = views(4, 4, seed=step)
        loss(z1.requires_grad_(), z2)
        seen.append(torch.nn.functional.normalize(z2, dim=1))
    last = torch.cat(seen)[-10:]
    torch.testing.assert_close(loss.bank, last.roll(2, 0))
    assert loss.bank_ptr == 2
    z1, z2 = views(25, 4)
    loss(z1.requires_grad_(), z2)  # more than fits: the last ten stay
    assert {tuple(row.tolist()) for row in loss.bank} == {
        tuple(row.tolist()) for row in torch.nn.functional.normalize(z2, dim=1)[-10:]
    }


def test_memory_bank_is_saved_and_rests_in_evaluation():
    loss = losses.NTXentLoss(0.2, (10, 4))
    z1, z2 = views(4, 4)
    before = loss.bank.clone()
    with torch.no_grad():
        loss(z1, z2)
    assert torch.equal(loss.bank, before)
    loss(z1.requires_grad_(), z2).backward()
    assert not torch.equal(loss.bank, before)
    other = losses.NTXentLoss(0.2, (10, 4))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.bank, loss.bank)
    assert other.bank_ptr == loss.bank_ptr == 4
    assert repr(loss) == "NTXentLoss(temperature=0.2, memory_bank_size=(10, 4))"


def test_normalize_is_that_of_torch():
    rows = views(5, 4, torch.float64)[0]
    rows[1], rows[2], rows[3, 2] = 0, rows[2] * 1e-13, math.nan  # two are shorter than F.normalize's eps
    functions = normalize, lambda t: torch.nn.functional.normalize(t, dim=-1)
    for a, b in zip(*(loss_and_grads(f, rows) for f in functions), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0, equal_nan=True)
    third = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalize, third)
    assert torch.autograd.gradgradcheck(normalize, third)


# All of them

CALLS = {
    "InfoNCE": lambda a, b: losses.InfoNCE(0.3)(a, b),
    "InfoNCE unpaired": lambda a, b: losses.InfoNCE(0.3)(a, b, a.flip(0) + 1),
    "InfoNCE paired": lambda a, b: losses.InfoNCE(0.3, negative_mode="paired")(a, b, a.flip(0)[:, None] + b),
    "ClipLoss": lambda a, b: losses.ClipLoss()(a, b, 3.0),
    "SigLipLoss": lambda a, b: losses.SigLipLoss()(a, b, 3.0, -2.0),
    "SupConLoss": lambda a, b: losses.SupConLoss(0.3)(torch.cat([a, b]), torch.arange(2 * len(a)) % 3),
    "SupConLoss ref": lambda a, b: losses.SupConLoss(0.3)(
        a, torch.arange(len(a)) % 3, None, b, torch.arange(len(b)) % 2
    ),
    "DCLLoss": lambda a, b: losses.DCLLoss(0.3)(a, b),
    "DCLWLoss": lambda a, b: losses.DCLWLoss(0.3)(a, b),
    "NTXentLoss": lambda a, b: losses.NTXentLoss(0.3)(a, b),
}


@pytest.mark.parametrize("name", [name for name in CALLS if name != "DCLWLoss"])  # whose weights get no gradient
def test_gradcheck(name):
    a, b = (t.requires_grad_() for t in views(6, 4, torch.float64))
    assert torch.autograd.gradcheck(CALLS[name], (a, b))


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_compile(name):
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    a, b = views(12, 8)
    for x, y in zip(loss_and_grads(compiled, a, b), loss_and_grads(CALLS[name], a, b), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_keeps_full_accuracy(name):
    a, b = views(30, 16)

    def within_autocast(a, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return CALLS[name](a, b)

    within = loss_and_grads(within_autocast, a, b)
    for x, y in zip(within, loss_and_grads(CALLS[name], a, b), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", CALLS)
def test_nan_stays_nan(name):
    a, b = views(12, 8)
    a[3, 2] = math.nan
    assert CALLS[name](a, b).isnan()


Z, T = torch.randn(4, 8), torch.arange(4)
BAD_CALLS = {
    "InfoNCE batch": (lambda: losses.InfoNCE()(Z, Z[:3]), ValueError, r"positive_key: expected the shape of query"),
    "InfoNCE dtype": (lambda: losses.InfoNCE()(Z, Z.double()), TypeError, "positive_key: expected the dtype of query"),
    "InfoNCE integers": (lambda: losses.InfoNCE()(Z.long(), Z), TypeError, "query: expected a floating-point"),
    "InfoNCE paired": (lambda: losses.InfoNCE(negative_mode="paired")(Z, Z, Z), ValueError, "negative_keys: expected"),
    "InfoNCE mode": (lambda: losses.InfoNCE(negative_mode="both"), ValueError, "negative_mode: expected 'unpaired'"),
    "InfoNCE reduction": (lambda: losses.InfoNCE(reduction="max"), ValueError, "reduction: expected one of"),
    "InfoNCE temperature": (lambda: losses.InfoNCE(0.0), ValueError, "temperature: expected a positive number"),
    "ClipLoss shape": (lambda: losses.ClipLoss()(Z, Z[:, :3], 1.0), ValueError, "text_features: expected the shape of"),
    "SigLipLoss shape": (
        lambda: losses.SigLipLoss()(Z, Z[:3], 1.0),
        ValueError,
        "text_features: expected the shape of",
    ),
    "SupConLoss labels": (lambda: losses.SupConLoss()(Z, T[:3]), ValueError, r"labels: expected shape \(4,\)"),
    "SupConLoss no labels": (lambda: losses.SupConLoss()(Z), ValueError, "labels: expected a tensor, or indices_tuple"),
    "SupConLoss ref": (lambda: losses.SupConLoss()(Z, T, None, Z[:3]), ValueError, r"labels: expected shape \(3,\)"),
    "SupConLoss 1-D": (lambda: losses.SupConLoss()(Z[0], T), ValueError, "embeddings: expected shape"),
    "SupConLoss pairs": (lambda: losses.SupConLoss()(Z, T, (T, T)), ValueError, "indices_tuple: expected 3 or 4"),
    "SupConLoss both": (lambda: losses.SupConLoss()(Z, T, (T, T, T)), ValueError, "indices_tuple: .* positive or neg"),
    "DCLLoss one row": (lambda: losses.DCLLoss()(Z[:1], Z[:1]), ValueError, "out0: expected at least two rows"),
    "NTXentLoss bank": (lambda: losses.NTXentLoss(0.5, 4096), ValueError, r"memory_bank_size: expected \(size, dim\)"),
    "NTXentLoss dim": (lambda: losses.NTXentLoss(0.5, (16, 4))(Z, Z), ValueError, "out0: expected 4 columns"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()
