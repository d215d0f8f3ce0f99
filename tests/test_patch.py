"""Patched libraries give the results that they gave before, and come back as they were. All of them are installed."""

import contextlib
import copy
import io
import logging
import pickle
import subprocess
import sys

import info_nce
import lightly.loss
import lightly.loss.ntx_ent_loss
import open_clip
import open_clip.loss
import pytest
import pytorch_metric_learning.losses
import torch
from lightly.loss import NTXentLoss  # under a name of its own, from before any patch
from lightly.models.modules.memory_bank import MemoryBankModule
from pytorch_metric_learning import distances, reducers, regularizers
from torch import nn

import sslfast
from sslfast import losses
from sslfast.patch import FASTER, Patch

metric_losses = pytorch_metric_learning.losses


def views(count: int = 3, rows: int = 24, dim: int = 16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [nn.functional.normalize(torch.randn(rows, dim)).requires_grad_() for _ in range(count)]


def labels() -> torch.Tensor:
    return torch.arange(24) % 5


class Scaled(nn.Module):
    """CLIP's loss with the parameters that get a gradient."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss, self.scale, self.bias = loss, nn.Parameter(torch.tensor(9.0)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, images, texts):
        return self.loss(images, texts, self.scale, self.bias)


# By library: what makes a loss, what calls it with three views, and our front that it must come to.
CASES = {
    "lightly": [
        (lambda: lightly.loss.NTXentLoss(0.2), lambda loss, x, y, _: loss(x, y), "NTXentLoss"),
        (lambda: lightly.loss.NTXentLoss(0.2, (60, 16)), lambda loss, x, y, z: loss(x, y) + loss(y, z), "InfoNCE"),
        (lambda: lightly.loss.DCLLoss(0.2), lambda loss, x, y, _: loss(x, y), "DCLLoss"),
        (lambda: lightly.loss.DCLWLoss(0.2, sigma=0.7), lambda loss, x, y, _: loss(x, y), "DCLLoss"),
    ],
    "open_clip": [
        (lambda: Scaled(open_clip.ClipLoss()), lambda loss, x, y, _: loss(x, y), "ClipLoss"),
        (lambda: Scaled(open_clip.loss.SigLipLoss()), lambda loss, x, y, _: loss(x, y), "SigLipLoss"),
        (
            lambda: open_clip.ClipLoss(cache_labels=True),
            lambda loss, x, y, _: loss(x, y, 5.0, output_dict=True)["contrastive_loss"],
            "ClipLoss",
        ),
        (
            lambda: open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0),
            lambda loss, x, y, z: sum(loss(x, y, z[:, None], torch.ones(24, 1, dtype=torch.int64), 5.0)),
            "ClipLoss",
        ),
    ],
    "pytorch_metric_learning": [
        (lambda: metric_losses.SupConLoss(0.2), lambda loss, x, *_: loss(x, labels()), "SupConLoss"),
        (
            lambda: metric_losses.SupConLoss(0.2),
            lambda loss, x, y, _: loss(x, labels(), ref_emb=y, ref_labels=labels().flip(0)),
            "SupConLoss",
        ),
        (
            lambda: metric_losses.SelfSupervisedLoss(metric_losses.SupConLoss()),
            lambda loss, x, y, _: loss(x, y),
            "SupConLoss",
        ),
    ],
    "info_nce": [
        (lambda: info_nce.InfoNCE(0.2), lambda loss, x, y, _: loss(x, y), "InfoNCE"),
        (lambda: info_nce.InfoNCE(0.2, "sum"), lambda loss, x, y, z: loss(x, y, z[:7]), "InfoNCE"),
        (
            lambda: info_nce.InfoNCE(negative_mode="paired"),
            lambda loss, x, y, z: loss(x, y, z.view(24, 1, 16)),
            "InfoNCE",
        ),
        (lambda: nn.Module(), lambda _, x, y, z: info_nce.info_nce(x, y, z, temperature=0.3), "InfoNCE"),
    ],
}
FLAT = [(library, *case) for library, cases in CASES.items() for case in cases]


def value_and_gradients(loss: nn.Module, call) -> list[torch.Tensor]:
    inputs = views()
    value = call(loss, *inputs)
    value.backward()
    wanted = [*inputs, *loss.parameters()]
    return [value.detach(), *(t.grad for t in wanted if t.grad is not None), *loss.buffers()]


@pytest.fixture(autouse=True)
def nothing_is_logged_and_nothing_stays_patched(request, caplog):
    caplog.set_level(logging.WARNING, "sslfast")
    sslfast.patch.__globals__["_said"].clear()
    yield
    assert not sslfast.patch.__globals__["_replaced"], "a test left a library patched"
    if "runs_as_before" not in request.node.name:
        assert not caplog.records


@pytest.mark.parametrize(
    ("library", "make", "call", "front"), FLAT, ids=[f"{case[0]}-{case[-1]}-{n}" for n, case in enumerate(FLAT)]
)
def test_results_are_those_of_the_library(library, make, call, front, monkeypatch):
    torch.manual_seed(1)
    loss = make()
    expected = value_and_gradients(copy.deepcopy(loss), call)
    calls = []
    ours = getattr(losses, front).forward
    monkeypatch.setattr(
        getattr(losses, front), "forward", lambda *args, **kwargs: calls.append(1) or ours(*args, **kwargs)
    )
    with sslfast.patch(library):
        found = value_and_gradients(loss, call)
    assert calls, "our kernels were not asked"
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("library", FASTER)
def test_undo_restores_what_was_there(library):
    import pkgutil

    def places():
        found = []
        for place in FASTER[library]:
            owner, _, name = place.replace(":", ".").rpartition(".")
            owner = pkgutil.resolve_name(owner)
            found.append((name in vars(owner), getattr(owner, name)))
        return found

    before = places()
    patched = sslfast.patch(library)
    assert all(a[1] is not b[1] for a, b in zip(before, places(), strict=True))
    patched.undo()
    patched.undo()
    assert places() == before
    assert "undone" in repr(patched)


def is_patched() -> bool:
    return hasattr(lightly.loss.NTXentLoss.forward, "__wrapped__")


def test_patches_nest_in_any_order():
    with sslfast.patch("lightly"):
        with sslfast.patch("lightly"):
            assert is_patched()
            assert not hasattr(lightly.loss.NTXentLoss.forward.__wrapped__, "__wrapped__"), "patched twice"
        assert is_patched()
    assert not is_patched()
    first, second = sslfast.patch("lightly"), sslfast.patch("lightly")
    first.undo()
    first.undo()
    assert is_patched()
    second.undo()
    assert not is_patched()
    with pytest.raises(RuntimeError, match="oops"), sslfast.patch("lightly"):
        raise RuntimeError("oops")
    assert not is_patched()


def test_every_name_and_every_object_is_reached(monkeypatch):
    """Whatever was imported, made, or subclassed before the patch."""

    class Mine(NTXentLoss):
        def __init__(self):
            super().__init__(temperature=0.3)

        def forward(self, out0, out1):
            return 2 * super().forward(out0, out1)

    made = [NTXentLoss(0.3), Mine()]
    seen = []
    monkeypatch.setattr(losses.NTXentLoss, "forward", lambda self, out0, out1: seen.append(1) or out0.sum())
    with sslfast.patch("lightly"):
        for loss in [*made, Mine(), lightly.loss.NTXentLoss(), lightly.loss.ntx_ent_loss.NTXentLoss()]:
            loss(*views(2))
            assert isinstance(loss, NTXentLoss)
    assert len(seen) == 5
    made[0](*views(2))
    assert len(seen) == 5


def test_the_temperature_may_change_between_calls():
    loss = lightly.loss.NTXentLoss(0.5)
    with sslfast.patch("lightly"):
        loss.temperature = 0.1
        found = loss(*views(2))
    torch.testing.assert_close(found, loss(*views(2)), rtol=2e-5, atol=2e-6)


def test_pickles_and_checkpoints_pass_between_patched_and_not(tmp_path):
    def saved(module) -> bytes:
        file = io.BytesIO()
        torch.save(module, file)
        return file.getvalue()

    def loaded(content: bytes) -> nn.Module:
        return torch.load(io.BytesIO(content), weights_only=False)

    before = nn.ModuleList([lightly.loss.NTXentLoss(0.2, (8, 4)), metric_losses.SupConLoss(0.3)])
    plain, state = saved(before), before.state_dict()
    with sslfast.patch("lightly"), sslfast.patch("pytorch_metric_learning"):
        patched = nn.ModuleList([lightly.loss.NTXentLoss(0.2, (8, 4)), metric_losses.SupConLoss(0.3)])
        patched.load_state_dict(state)
        assert patched.state_dict().keys() == state.keys()
        assert saved(before), "an object of before the patch"
        assert loaded(plain)[0].temperature == 0.2
        content = saved(patched)
        assert pickle.loads(pickle.dumps(patched[0])).temperature == 0.2
    assert loaded(content)[1].temperature == 0.3
    assert saved(patched)
    assert type(patched[0]) is lightly.loss.NTXentLoss


class OtherLogits(open_clip.ClipLoss):
    def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
        logits = super().get_logits(image_features, text_features, logit_scale, logit_bias)
        return tuple(2 * each for each in logits)


Regularized = regularizers.LpRegularizer


class TwiceTheBank(MemoryBankModule):
    def forward(self, *args, **kwargs):
        keys, bank = super().forward(*args, **kwargs)
        return keys, 2 * bank


def changed(loss: nn.Module, **attributes) -> nn.Module:
    for name, value in attributes.items():
        setattr(loss, name, value)
    return loss


def with_hook(loss: nn.Module, part: str) -> nn.Module:
    loss.get_submodule(part).register_forward_hook(lambda module, inputs, output: 2 * output)
    return loss


@pytest.mark.parametrize(
    ("library", "make", "call", "reason"),
    [
        (
            "open_clip",
            OtherLogits,
            lambda loss, x, y, _: loss(x, y, 5.0),
            "open_clip.loss.ClipLoss.forward runs as before: a subclass that changes how it computes",
        ),
        (
            "pytorch_metric_learning",
            lambda: metric_losses.SupConLoss(0.5, distance=distances.LpDistance()),
            lambda loss, x, *_: loss(x, labels()),
            "distance: only CosineSimilarity",
        ),
        (
            "pytorch_metric_learning",
            lambda: metric_losses.SupConLoss(reducer=reducers.MeanReducer()),
            lambda loss, x, *_: loss(x, labels()),
            "reducer: only AvgNonZeroReducer",
        ),
        (
            "pytorch_metric_learning",
            lambda: metric_losses.SupConLoss(embedding_regularizer=Regularized()),
            lambda loss, x, *_: loss(x, labels()),
            "reducer: only AvgNonZeroReducer",
        ),
        (
            "pytorch_metric_learning",
            lambda: metric_losses.SupConLoss(collect_stats=True),
            lambda loss, x, *_: loss(x, labels()),
            "collect_stats: only False",
        ),
        (
            "pytorch_metric_learning",
            lambda: metric_losses.SupConLoss(reducer=reducers.AvgNonZeroReducer(high=2.0)),
            lambda loss, x, *_: loss(x, labels()),
            "reducer: only AvgNonZeroReducer",
        ),
        (
            "lightly",
            lambda: changed(NTXentLoss(0.5), cross_entropy=nn.CrossEntropyLoss(label_smoothing=0.1)),
            lambda loss, x, y, _: loss(x, y),
            "cross_entropy: only CrossEntropyLoss() is supported, got CrossEntropyLoss",
        ),
        (
            "lightly",
            lambda: changed(NTXentLoss(0.5, (60, 16)), memory_bank=TwiceTheBank((60, 16))),
            lambda loss, x, y, _: loss(x, y),
            "memory_bank: only a MemoryBankModule",
        ),
        (
            "lightly",
            lambda: with_hook(NTXentLoss(0.5), "cross_entropy"),
            lambda loss, x, y, _: loss(x, y),
            "a part of it has forward hooks",
        ),
        (
            "open_clip",
            lambda: changed(open_clip.ClipLoss(), get_logits=lambda a, b, scale, logit_bias: (a @ b.T, b @ a.T)),
            lambda loss, x, y, _: loss(x, y, 5.0),
            "a subclass that changes how it computes",
        ),
        (
            "open_clip",
            lambda: open_clip.ClipLoss(),
            lambda loss, x, y, _: loss(x, y, 5.0, torch.linspace(-1, 1, 24 * 24).view(24, 24)),
            "logit_bias: expected one element",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_is_not_supported_runs_as_before_after_one_sentence(library, make, call, reason, caplog):
    loss = make()
    expected = value_and_gradients(copy.deepcopy(loss), call)
    with sslfast.patch(library):
        for _ in range(2):
            found = value_and_gradients(copy.deepcopy(loss), call)
            torch.testing.assert_close(found, expected)
    assert [record.name for record in caplog.records] == ["sslfast"]
    assert reason in caplog.text


@pytest.mark.parametrize(
    "error", [AttributeError("no such thing"), KeyError("a"), RuntimeError("b"), MemoryError(), OSError()]
)
@pytest.mark.parametrize(("library", "make", "call", "front"), FLAT[:3] + FLAT[4:6] + FLAT[8:9] + FLAT[11:12])
def test_any_error_of_ours_runs_as_before(library, make, call, front, error, monkeypatch, caplog):
    """After nothing was changed, such as lightly's memory bank."""
    torch.manual_seed(1)
    loss = make()
    expected = value_and_gradients(copy.deepcopy(loss), call)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(getattr(losses, front), "forward", fail)
    with sslfast.patch(library):
        found = value_and_gradients(loss, call)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (str(error) or type(error).__name__) in caplog.text


TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("library", "make", "call", "front"), FLAT)
def test_dtypes_and_errors_are_those_of_the_library_runs_as_before(library, make, call, front, cast):
    """For each two float types, in autocast and out of it; the bank, too, is the library's afterwards."""

    def outcomes() -> list:
        found = []
        for first in TYPES:
            for second in TYPES:
                torch.manual_seed(1)
                loss = make()
                bank = [t for t in loss.buffers() if len(t) > 1]
                x, y, z = views()
                x, y, z = x.detach().to(first).requires_grad_(), y.detach().to(second), z.detach().to(second)
                with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
                    try:
                        value = call(loss, x, y, z)
                        value.sum().backward()
                        found.append((value.dtype, value.detach().float(), x.grad.float(), bank))
                    except RuntimeError as error:
                        found.append((type(error), str(error), None, bank))
        return found

    expected = outcomes()
    with sslfast.patch(library):
        found = outcomes()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[0] == theirs[0]
        torch.testing.assert_close(ours[3], theirs[3], rtol=0.02, atol=0.02)
        if theirs[2] is None:
            assert ours[1] == theirs[1]
        else:
            torch.testing.assert_close(ours[1], theirs[1], rtol=0.05, atol=0.05)
            assert (ours[2] - theirs[2]).norm() <= 0.2 * theirs[2].norm() + 1e-3


def test_weights_of_another_dtype():
    loss = lightly.loss.DCLLoss(0.2, weight_fn=lambda a, b: (a * b).sum(1).float())
    x, y = (t.detach().half() for t in views(2))
    expected = loss(x, y)
    with sslfast.patch("lightly"):
        found = loss(x, y)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


def test_the_bank_takes_keys_in_once_whoever_computes():
    def run(patched: bool) -> tuple:
        torch.manual_seed(0)
        queries, keys = torch.randn(2, 8, 16)
        loss = NTXentLoss(0.1, memory_bank_size=(64, 16))
        with contextlib.ExitStack() as stack:
            if patched:
                stack.enter_context(sslfast.patch("lightly"))
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            value = loss(queries.bfloat16().requires_grad_(), keys)
        return value.item(), int(loss.memory_bank.bank_ptr), loss.memory_bank.bank

    (found, *bank), (expected, *theirs) = run(True), run(False)
    assert found == pytest.approx(expected, rel=0.01)
    assert bank[0] == theirs[0] == 8
    assert torch.equal(bank[1], theirs[1])


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_other_versions_of_open_clip(name):
    """Without use_horovod, and with chunks, whose sum is in float32."""
    loss = getattr(open_clip.loss, name)()
    images, texts = (t.detach() for t in views(2))
    expected = loss(images, texts, 5.0, -1.0)
    if name == "ClipLoss":
        del loss.use_horovod
    else:
        loss.chunk_size = 7
    with sslfast.patch("open_clip"):
        torch.testing.assert_close(loss(images, texts, 5.0, -1.0), expected, rtol=2e-5, atol=2e-6)
        half = loss(images.half(), texts.half(), 5.0, -1.0)
    assert half.dtype == (torch.float16 if name == "ClipLoss" else torch.float32)
    assert loss.training


def test_the_libraries_own_errors_stay_and_runs_as_before_is_said(caplog):
    with sslfast.patch("info_nce"), pytest.raises(ValueError, match="<query> must have 2 dimensions"):
        info_nce.InfoNCE()(torch.ones(3), torch.ones(3))


def test_a_method_that_someone_else_replaced_meanwhile_stays_and_runs_as_before(caplog, monkeypatch):
    original = lightly.loss.NTXentLoss.forward
    patched = sslfast.patch("lightly")
    lightly.loss.NTXentLoss.forward = theirs = lambda self, out0, out1: 0
    patched.undo()
    assert lightly.loss.NTXentLoss.forward is theirs
    assert "NTXentLoss.forward was replaced by someone else" in caplog.text
    lightly.loss.NTXentLoss.forward = original


def test_an_older_version_without_a_place_and_what_it_has_runs_as_before(caplog, monkeypatch):
    monkeypatch.setitem(FASTER, "lightly", {"lightly.loss.new:NewLoss.forward": None, **FASTER["lightly"]})
    with sslfast.patch("lightly"):
        assert is_patched()
    assert not is_patched()
    assert "lightly.loss.new.NewLoss.forward does not exist in the version that is installed" in caplog.text


def test_a_patched_loss_compiles():
    loss = lightly.loss.NTXentLoss(0.2)
    expected = loss(*views(2))
    with sslfast.patch("lightly"):
        compiled = torch.compile(lambda x, y: loss(x, y), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*views(2)), expected, rtol=2e-5, atol=2e-6)


def test_a_library_that_nobody_knows():
    with pytest.raises(ValueError, match=r"library: expected one of 'lightly', 'open_clip', .*, got 'lightning'"):
        sslfast.patch("lightning")


def test_a_library_that_is_not_installed():
    program = (
        "import sys; sys.modules['open_clip'] = None\n"
        "import sslfast\n"
        "try: sslfast.patch('open_clip')\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "library: 'open_clip' is not installed here", result.stderr


def test_what_patch_returns():
    patched = sslfast.patch("info_nce")
    assert isinstance(patched, Patch)
    assert repr(patched) == "<sslfast.patch('info_nce')>"
    patched.undo()
