"""The losses take what their originals take: compared live with the installed libraries, also by hypothesis."""

import io
import subprocess
import sys

import info_nce
import lightly.loss
import open_clip.loss
import pytest
import pytorch_metric_learning.losses
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import distances, reducers, regularizers
from torch import Tensor, nn

from sslfast import losses

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SETTINGS = settings(max_examples=40, deadline=None)
LABELS = torch.arange(8) % 3
metric_losses = pytorch_metric_learning.losses


def rows(number: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(number, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def result(call, *tensors) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = call(*leaves)
    grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True))]


def check_same(ours, theirs, *tensors, rtol=2e-5, atol=2e-6) -> None:
    for found, expected in zip(result(ours, *tensors), result(theirs, *tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, check_dtype=False)


# What is called, by our classes and by theirs, of two matrices.
PAIRS = {
    "NTXentLoss": (losses.NTXentLoss(0.3), lightly.loss.NTXentLoss(0.3)),
    "DCLLoss": (losses.DCLLoss(0.3), lightly.loss.DCLLoss(0.3)),
    "DCLWLoss": (losses.DCLWLoss(0.3), lightly.loss.DCLWLoss(0.3)),
    "InfoNCE": (losses.InfoNCE(0.3), info_nce.InfoNCE(0.3)),
    "InfoNCE unpaired": tuple(
        lambda a, b, loss=loss: loss(a, b, a.detach().flip(0)) for loss in (losses.InfoNCE(0.3), info_nce.InfoNCE(0.3))
    ),
    "InfoNCE paired": tuple(
        lambda a, b, loss=loss: loss(a, b, a.detach()[:, None])
        for loss in (losses.InfoNCE(0.3, negative_mode="paired"), info_nce.InfoNCE(0.3, negative_mode="paired"))
    ),
    "ClipLoss": tuple(
        lambda a, b, loss=loss: loss(a, b, torch.tensor(3.0)) for loss in (losses.ClipLoss(), open_clip.loss.ClipLoss())
    ),
    "SigLipLoss": tuple(
        lambda a, b, loss=loss: loss(a, b, torch.tensor(3.0), torch.tensor(-1.0))
        for loss in (losses.SigLipLoss(), open_clip.loss.SigLipLoss())
    ),
    "SupConLoss": tuple(
        lambda a, b, loss=loss: loss(a, LABELS, None, b, LABELS.flip(0))
        for loss in (losses.SupConLoss(0.3), metric_losses.SupConLoss(0.3))
    ),
}
PAIRS["NTXentLoss with a bank"] = (losses.NTXentLoss(0.3, (20, 6)), lightly.loss.NTXentLoss(0.3, (20, 6)))
PAIRS["NTXentLoss with a bank"][1].memory_bank.bank.copy_(PAIRS["NTXentLoss with a bank"][0].bank)


@pytest.mark.parametrize("name", PAIRS)
def test_two_float_types_are_taken_where_the_original_takes_them(name):
    """Within autocast, that is, and in InfoNCE with negatives; then the loss is that of the original in float32."""
    ours, theirs = PAIRS[name]
    a, b = rows(8, 6, 1), rows(8, 6, 2)
    for cast in (None, torch.bfloat16, torch.float16):
        for first in DTYPES:
            for second in DTYPES:
                x, y = a.to(first), b.to(second)
                with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
                    try:
                        expected = theirs(x, y)
                    except RuntimeError:
                        continue
                    found = ours(x, y)
                torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02, check_dtype=False)
                wide = torch.float64 if torch.float64 in (first, second) else torch.float32
                exact = theirs(x.to(wide), y.to(wide))
                torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_two_float_types_are_an_error_outside_of_autocast_or_with_float64():
    a, b = rows(4, 6, 1), rows(4, 6, 2).bfloat16()
    with pytest.raises(TypeError, match=r"out1: expected the dtype of out0, torch.float32, got torch.bfloat16"):
        losses.NTXentLoss()(a, b)
    with torch.autocast("cpu"), pytest.raises(TypeError, match="text_features: expected the dtype of image_features"):
        losses.ClipLoss()(a.double(), b, 1.0)


@SETTINGS
@given(
    name=st.sampled_from(["NTXentLoss", "DCLLoss", "DCLWLoss", "InfoNCE", "SupConLoss"]),
    batch=st.integers(2, 9),
    dim=st.integers(1, 9),
    temperature=st.floats(-3, 3).filter(lambda t: abs(t) > 0.05),
    seed=st.integers(0, 100),
)
def test_any_temperature_but_0(name, batch, dim, temperature, seed):
    library = {"InfoNCE": info_nce, "SupConLoss": metric_losses}.get(name, lightly.loss.dcl_loss)
    library = lightly.loss if name == "NTXentLoss" else library
    ours, theirs = getattr(losses, name)(temperature), getattr(library, name)(temperature)
    a, b = rows(batch, dim, seed, torch.float64), rows(batch, dim, seed + 1, torch.float64)
    labels = torch.arange(batch) % 2
    if name == "SupConLoss":
        check_same(lambda x, y: ours(x, labels), lambda x, y: theirs(x, labels), a, b)
    else:
        check_same(ours, theirs, a, b)


@pytest.mark.parametrize("make", [losses.NTXentLoss, losses.DCLLoss, losses.InfoNCE, losses.SupConLoss])
@pytest.mark.parametrize(
    "temperature", [0, 0.0, float("nan"), float("inf"), 1e-310, 10**400, torch.tensor(0.0)], ids=lambda t: str(t)[:9]
)
def test_a_temperature_by_which_nothing_can_be_divided(make, temperature):
    with pytest.raises((ValueError, TypeError), match="temperature: expected"):
        make(temperature)


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "InfoNCE", "SupConLoss"])
def test_a_temperature_may_be_learnt(name):
    library = {"InfoNCE": info_nce, "SupConLoss": metric_losses}.get(name, lightly.loss)
    temperatures = [nn.Parameter(torch.tensor(0.4)) for _ in range(2)]
    for kind, temperature in zip((getattr(losses, name), getattr(library, name)), temperatures, strict=True):
        loss = kind(temperature)
        assert list(loss.parameters()) == [temperature]
        other = LABELS if name == "SupConLoss" else rows(8, 6, 2)
        loss(rows(8, 6, 1), other).backward()
    torch.testing.assert_close(temperatures[0].grad, temperatures[1].grad, rtol=1e-4, atol=1e-6)


# lightly


@pytest.mark.parametrize("kind", [losses.NTXentLoss, losses.DCLLoss, losses.DCLWLoss])
def test_gathering_needs_torch_distributed(kind, monkeypatch):
    kind(gather_distributed=True)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    kind()
    with pytest.raises(ValueError, match=r"gather_distributed: expected False where torch.distributed is not"):
        kind(gather_distributed=True)


def test_losses_of_one_process_need_no_torch_distributed():
    program = """if True:
        import torch
        import torch.distributed as dist
        dist.is_available = lambda: False
        for name in ("ProcessGroup", "all_gather_single", "all_gather_into_tensor", "reduce_scatter_tensor", "isend"):
            if hasattr(dist, name):
                delattr(dist, name)
        from sslfast.losses import DCLLoss, NTXentLoss
        z = torch.randn(4, 3)
        print(all(loss(z, z).isfinite() for loss in (NTXentLoss(), DCLLoss())))
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert run.stdout.strip() == "True", run.stderr


def model(loss: nn.Module) -> nn.Module:
    return nn.ModuleDict({"encoder": nn.Linear(3, 2), "criterion": loss})


def saved_and_loaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def with_a_bank() -> nn.Module:
    loss = losses.NTXentLoss(0.2, (10, 4))
    loss(rows(3, 4, 1).requires_grad_(), rows(3, 4, 2))
    return model(loss)


def test_checkpoints_of_lightlys_loss_and_ours_load_strictly_into_each_other():
    ours, theirs = with_a_bank(), model(lightly.loss.NTXentLoss(0.2, (10, 4)))
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["encoder.weight", "encoder.bias"]
    assert list(losses.NTXentLoss(0.2, (10, 4)).state_dict()) == []
    theirs.load_state_dict(saved_and_loaded(ours.state_dict()), strict=True)
    bank = ours["criterion"].bank.clone()
    ours.load_state_dict(saved_and_loaded(theirs.state_dict()), strict=True)
    assert torch.equal(ours["criterion"].bank, bank), "there was none in the checkpoint"
    assert losses.NTXentLoss().load_state_dict(lightly.loss.NTXentLoss().state_dict())


def test_our_checkpoints_keep_the_bank():
    ours, other = with_a_bank(), model(losses.NTXentLoss(0.2, (10, 4)))
    other.load_state_dict(saved_and_loaded(ours.state_dict()))
    assert torch.equal(other["criterion"].bank, ours["criterion"].bank)
    assert other["criterion"].bank_ptr == 3
    assert list(other.state_dict()) == ["encoder.weight", "encoder.bias"]
    with pytest.raises(RuntimeError, match=r"size mismatch for criterion.bank: .*\[10, 4\].*\[12, 4\]"):
        model(losses.NTXentLoss(0.2, (12, 4))).load_state_dict(ours.state_dict())


def test_checkpoints_of_version_0_1_keep_the_bank():
    state = {"bank": rows(10, 4, 5), "bank_ptr": torch.tensor(7)}
    loss = losses.NTXentLoss(0.2, (10, 4))
    loss.load_state_dict(state)
    assert torch.equal(loss.bank, state["bank"])
    assert loss.bank_ptr == 7
    assert list(loss.state_dict()) == []
    with pytest.raises(RuntimeError, match="Unexpected"):
        losses.NTXentLoss(0.2).load_state_dict(state)


# info-nce-pytorch


@pytest.mark.parametrize("mode", ["unpaired", "paired"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_negative_at_all(mode, reduction):
    none = torch.zeros((0, 6) if mode == "unpaired" else (8, 0, 6))
    ours, theirs = losses.InfoNCE(0.3, reduction, mode), info_nce.InfoNCE(0.3, reduction, mode)
    check_same(lambda a, b: ours(a, b, none), lambda a, b: theirs(a, b, none), rows(8, 6, 1), rows(8, 6, 2))


@pytest.mark.parametrize(
    ("negatives", "message"),
    [
        ([[1.0] * 6], "negative_keys: expected a floating-point tensor, got list"),
        (torch.ones(5, 6, dtype=torch.int64), "negative_keys: expected a floating-point tensor, got torch.int64"),
        (torch.ones(5, 7), r"negative_keys: expected shape \(any, 6\), got \(5, 7\)"),
        (torch.ones(8, 5, 6), r"negative_keys: expected shape \(any, 6\), got \(8, 5, 6\)"),
    ],
)
def test_negatives_that_do_not_fit_are_named(negatives, message):
    with pytest.raises((TypeError, ValueError), match=message):
        losses.InfoNCE()(rows(8, 6, 1), rows(8, 6, 2), negatives)


# open_clip


@pytest.mark.parametrize("scale", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor([[3]])], ids=str)
@pytest.mark.parametrize("bias", [None, 1, torch.tensor(1), torch.tensor([1.0])], ids=str)
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_scale_and_bias_of_any_kind(name, scale, bias):
    ours, theirs = getattr(losses, name)(), getattr(open_clip.loss, name)()
    a, b = rows(8, 6, 1), rows(8, 6, 2)
    check_same(lambda x, y: ours(x, y, scale, bias), lambda x, y: theirs(x, y, scale, bias), a, b)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_a_bias_for_each_pair_is_refused(name):
    with pytest.raises(ValueError, match=r"logit_bias: expected one element, got shape \(8, 8\)"):
        getattr(losses, name)()(rows(8, 6, 1), rows(8, 6, 2), 1.0, torch.zeros(8, 8))


def test_logits_and_targets_for_subclasses():
    a, b, scale, bias = rows(8, 6, 1), rows(8, 6, 2), torch.tensor(3.0), torch.tensor(-1.0)
    ours, theirs = losses.ClipLoss(), open_clip.loss.ClipLoss()
    torch.testing.assert_close(ours.get_logits(a, b, scale), theirs.get_logits(a, b, scale))
    torch.testing.assert_close(ours.get_logits(a, b, scale, bias), theirs.get_logits(a, b, scale, bias))
    assert torch.equal(ours.get_ground_truth(a.device, 8), theirs.get_ground_truth(a.device, 8))
    ours, theirs = losses.SigLipLoss(), open_clip.loss.SigLipLoss()
    torch.testing.assert_close(ours.get_logits(a, b, scale, bias), theirs.get_logits(a, b, scale, bias))
    torch.testing.assert_close(ours.get_logits(a, b, 3.0), theirs.get_logits(a, b, 3.0))
    for only in (False, True):
        arguments = a.device, torch.float32, 8, only
        assert torch.equal(ours.get_ground_truth(*arguments), theirs.get_ground_truth(*arguments))


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("method", ["get_logits", "get_ground_truth"])
def test_what_a_subclass_overrides_is_what_is_used(name, method):
    def subclass(base):
        class Other(base):
            pass

        def get_logits(self, *args, **kwargs):
            logits = super(Other, self).get_logits(*args, **kwargs)
            return tuple(2 * each for each in logits) if isinstance(logits, tuple) else 2 * logits

        def get_ground_truth(self, *args, **kwargs):
            return super(Other, self).get_ground_truth(*args, **kwargs).flip(0)

        setattr(Other, method, {"get_logits": get_logits, "get_ground_truth": get_ground_truth}[method])
        return Other()

    ours, theirs = subclass(getattr(losses, name)), subclass(getattr(open_clip.loss, name))
    call = [
        lambda x, y, loss=loss: loss(x, y, 3.0, -1.0, output_dict=True)["contrastive_loss"] for loss in (ours, theirs)
    ]
    check_same(*call, rows(8, 6, 1), rows(8, 6, 2))


def test_options_of_siglip():
    a, b = rows(8, 6, 1), rows(8, 6, 2)
    expected = losses.SigLipLoss()(a, b, 3.0, -1.0)
    for options in ({"chunk_size": 3}, {"dist_impl": "gather"}, {"dist_impl": "reduce"}):
        assert torch.equal(losses.SigLipLoss(**options)(a, b, 3.0, -1.0), expected)
    with pytest.raises(ValueError, match="dist_impl: expected 'bidir'"):
        losses.SigLipLoss(dist_impl="round")


# pytorch-metric-learning

ALL_LABELS = st.sampled_from(
    [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *DTYPES, torch.uint16, torch.uint64]
)


@SETTINGS
@given(
    batch=st.integers(1, 12),
    others=st.integers(1, 12),
    classes=st.integers(1, 4),
    kind=ALL_LABELS,
    special=st.sampled_from([None, float("nan"), float("inf"), -0.0]),
    how=st.sampled_from(["alone", "other views", "ref", "ref of the same labels"]),
    seed=st.integers(0, 1000),
)
def test_labels_of_any_kind(batch, others, classes, kind, special, how, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (batch,), generator=generator).to(kind)
    ref_labels = torch.randint(0, classes, (others,), generator=generator).to(kind)
    if special is not None and kind.is_floating_point:
        for t in (labels, ref_labels):
            t[torch.rand(len(t), generator=generator) < 0.3] = special
    others = max(others, batch) if how == "other views" else batch if "same" in how else others
    ref_labels = {"ref": ref_labels, "ref of the same labels": labels}.get(how)
    ours, theirs = losses.SupConLoss(0.3), metric_losses.SupConLoss(0.3)
    a, b = rows(batch, 5, seed, torch.float64), rows(others, 5, seed + 1, torch.float64)
    if how == "alone":
        check_same(lambda x, y: ours(x, labels), lambda x, y: theirs(x, labels), a, b)
    else:
        check_same(
            lambda x, y: ours(x, labels, None, y, ref_labels), lambda x, y: theirs(x, labels, None, y, ref_labels), a, b
        )


@SETTINGS
@given(batch=st.integers(1, 9), others=st.integers(1, 9), count=st.integers(0, 30), seed=st.integers(0, 1000))
def test_pairs_of_any_kind(batch, others, count, seed):
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randint(0, batch, (2, count), generator=generator)
    keys = torch.randint(0, others, (2, count), generator=generator)
    kind = torch.randint(0, 2, (batch, others), generator=generator).bool()  # of each pair: positive or negative
    positive, negative = kind[anchors[0], keys[0]], ~kind[anchors[1], keys[1]]
    pairs = anchors[0][positive], keys[0][positive], anchors[1][negative], keys[1][negative]
    ours, theirs = losses.SupConLoss(0.3), metric_losses.SupConLoss(0.3)
    check_same(
        lambda x, y: ours(x, None, pairs, y),
        lambda x, y: theirs(x, None, pairs, y),
        rows(batch, 5, seed, torch.float64),
        rows(others, 5, seed + 1, torch.float64),
    )


def test_labels_of_two_kinds_and_no_label_at_all():
    a, b = rows(8, 6, 1), rows(8, 6, 2)
    ours, theirs = losses.SupConLoss(), metric_losses.SupConLoss()
    check_same(
        lambda x, y: ours(x, LABELS, None, y, LABELS.float() / 2),
        lambda x, y: theirs(x, LABELS, None, y, LABELS.float() / 2),
        a,
        b,
    )
    with pytest.raises(ValueError, match="labels: expected a tensor, or indices_tuple, got neither"):
        ours(a)
    with pytest.raises(TypeError, match=r"labels: expected a tensor of real numbers, got torch.complex64"):
        ours(a, LABELS.to(torch.complex64))
    with pytest.raises(ValueError, match=r"labels: expected shape \(8,\)"):
        ours(a, LABELS[:5], (LABELS, LABELS, LABELS))
    with pytest.raises(ValueError, match="ref_emb: expected 6 columns, as embeddings"):
        ours(a, LABELS, None, b[:, :3], LABELS)


def test_the_defaults_of_pytorch_metric_learning_may_be_given():
    defaults = {
        "distance": distances.CosineSimilarity(),
        "reducer": reducers.AvgNonZeroReducer(),
        "embedding_regularizer": None,
        "embedding_reg_weight": 3,
        "collect_stats": False,
    }
    check_same(
        lambda x: losses.SupConLoss(0.3, **defaults)(x, LABELS),
        lambda x: metric_losses.SupConLoss(0.3, **defaults)(x, LABELS),
        rows(8, 6, 1),
    )


@pytest.mark.parametrize(
    "option",
    [
        {"distance": distances.LpDistance()},
        {"distance": distances.DotProductSimilarity()},
        {"distance": distances.CosineSimilarity(power=2)},
        {"distance": distances.CosineSimilarity(p=1)},
        {"distance": distances.CosineSimilarity(collect_stats=True)},
        {"reducer": reducers.MeanReducer()},
        {"reducer": reducers.AvgNonZeroReducer(high=2.0)},
        {"reducer": reducers.AvgNonZeroReducer(collect_stats=True)},
        {"embedding_regularizer": regularizers.LpRegularizer()},
        {"collect_stats": True},
    ],
    ids=str,
)
def test_others_are_refused_by_name(option):
    name = "collect_stats" if "collect_stats=True" in str(option) else next(iter(option))
    with pytest.raises(NotImplementedError, match=f"{name}: only|collect_stats: only"):
        losses.SupConLoss(**option)


def test_supcon_within_its_librarys_wrappers():
    a, b = rows(8, 6, 1), rows(8, 6, 2)
    for symmetric in (True, False):
        check_same(
            metric_losses.SelfSupervisedLoss(losses.SupConLoss(), symmetric=symmetric),
            metric_losses.SelfSupervisedLoss(metric_losses.SupConLoss(), symmetric=symmetric),
            a,
            b,
        )
    ours, theirs = (
        metric_losses.CrossBatchMemory(loss, embedding_size=6, memory_size=20)
        for loss in (losses.SupConLoss(), metric_losses.SupConLoss())
    )
    for step in range(4):
        check_same(lambda x: ours(x, LABELS), lambda x: theirs(x, LABELS), rows(8, 6, step))
