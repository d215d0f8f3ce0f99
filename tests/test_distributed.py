"""The losses over several ranks, against the whole batch in one process. The ranks are processes with gloo."""

import copy
import itertools
import json
import traceback
from pathlib import Path

import lightly.loss
import open_clip.loss
import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sslfast
from sslfast import _C, distributed, losses, reference
from sslfast.training import UserError, micro_batch
from sslfast.training import distributed as training

WORLDS = (1, 2, 4)
ROWS, DIM = 24, 8
TOLERANCE = 1e-6


def whole_batch(count: int = 2, rows: int = ROWS) -> list[Tensor]:
    """Inputs that every rank can make for itself."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(rows, DIM, generator=generator) for _ in range(count)]


def mine(tensor: Tensor) -> Tensor:
    rows = len(tensor) // distributed.world_size()
    return tensor[distributed.rank() * rows : (distributed.rank() + 1) * rows]


class Model(nn.Module):
    """A layer and a temperature, both of which learn."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(DIM, DIM)
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, *inputs: Tensor):
        return *(self.layer(x) for x in inputs), self.scale


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def assert_as_one_process(loss_of_rank, loss_of_all, dtype=torch.float32, tolerance=TOLERANCE):
    """`loss_of_rank(outputs…)` under DistributedDataParallel against `loss_of_all(outputs…)` on the whole batch."""
    batch = [x.to(dtype) for x in whole_batch()]
    alone, wrapped = Model().double(), training.wrap(Model().to(dtype))
    expected = loss_of_all(*alone(*(x.double() for x in batch)))
    expected.backward()
    found = loss_of_rank(*wrapped(*map(mine, batch)))
    found.backward()
    torch.testing.assert_close(training.mean(found).double(), expected.detach(), rtol=tolerance, atol=tolerance)
    for gradient, wanted in zip(gradients(wrapped), gradients(alone), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance)


def nt_xent_of_all(x, y, scale):
    return reference.info_nce.nt_xent(x, y, 1 / scale)


def check_nt_xent_gathered():
    assert_as_one_process(lambda x, y, scale: distributed.nt_xent(x, y, 1 / scale), nt_xent_of_all)


def check_nt_xent_in_a_ring():
    assert_as_one_process(lambda x, y, scale: distributed.nt_xent(x, y, 1 / scale, ring=True), nt_xent_of_all)


def check_nt_xent_float64():
    for ring in (False, True):
        loss = lambda x, y, scale: distributed.nt_xent(x, y, 1 / scale, ring=ring)  # noqa: E731, B023
        assert_as_one_process(loss, nt_xent_of_all, torch.float64, 1e-12)


def check_nt_xent_bfloat16():
    """Gradients are sums of the ranks' parts: they must not lose more than one rounding to bfloat16."""
    x, y = (F.normalize(x).bfloat16() for x in whole_batch())
    inputs = [x.float().requires_grad_(), y.float().requires_grad_()]
    expected = reference.info_nce.nt_xent(*inputs, 0.5)
    expected.backward()
    for ring in (False, True):
        own = [mine(x).clone().requires_grad_(), mine(y).clone().requires_grad_()]
        loss = distributed.nt_xent(*own, 0.5, ring=ring)
        loss.backward()
        assert loss.dtype == torch.float32
        torch.testing.assert_close(training.mean(loss), expected.detach(), rtol=2e-3, atol=2e-3)
        for part, whole in zip(own, inputs, strict=True):
            wanted = mine(whole.grad) * distributed.world_size()
            torch.testing.assert_close(part.grad.float(), wanted, rtol=0.05, atol=0.02 * wanted.abs().max().item())


def check_the_module_of_simclr():
    for arguments in ({}, {"ring": True}):
        criterion = losses.NTXentLoss(0.2, gather_distributed=True, **arguments)
        assert_as_one_process(
            lambda x, y, scale, criterion=criterion: criterion(x, y) + 0 * scale,
            lambda x, y, scale: reference.info_nce.nt_xent(x, y, 0.2) + 0 * scale,
        )


def assert_same_on_this_rank(ours, theirs, learns: tuple[float, ...] = ()):
    """Two losses give this rank the same value and the same gradients, before any averaging."""
    results = []
    for criterion in (ours, theirs):
        own = [F.normalize(mine(x)).clone().requires_grad_() for x in whole_batch()]
        own += [torch.tensor(value, requires_grad=True) for value in learns]
        loss = criterion(*own)
        loss.backward()
        results.append((loss.detach(), *(torch.zeros(()) if x.grad is None else x.grad for x in own)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2 * TOLERANCE, atol=TOLERANCE)


def check_lightly_agrees_rank_by_rank():
    for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
        ours, theirs = (getattr(module, name)(0.3, gather_distributed=True) for module in (losses, lightly.loss))
        assert_same_on_this_rank(ours, theirs)


def check_open_clip_agrees_rank_by_rank():
    me, world = distributed.rank(), distributed.world_size()
    for local_loss, gather_with_grad in itertools.product((False, True), repeat=2):
        arguments = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "rank": me, "world_size": world}
        ours, theirs = losses.ClipLoss(**arguments), open_clip.loss.ClipLoss(**arguments, cache_labels=True)
        assert_same_on_this_rank(ours, theirs, learns=(7.0,))
    ours, theirs = (module.SigLipLoss(rank=me, world_size=world) for module in (losses, open_clip.loss))
    assert_same_on_this_rank(ours, theirs, learns=(7.0, -2.0))


def check_clip():
    me, world = distributed.rank(), distributed.world_size()

    def of_all(x, y, scale):
        logits, labels = scale * x @ y.T, torch.arange(len(x))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    for local_loss, ring in ((False, False), (True, False), (True, True)):
        criterion = losses.ClipLoss(local_loss, True, rank=me, world_size=world, ring=ring)
        assert_as_one_process(criterion, of_all)
    if world > 1:
        with pytest.raises(ValueError, match=f"rank, world_size: expected those .*, {me} and {world}, got 9 and 16"):
            losses.ClipLoss(rank=9, world_size=16)(*whole_batch(), 1.0)


def check_siglip():
    criterion = losses.SigLipLoss(rank=distributed.rank(), world_size=distributed.world_size())

    def of_all(x, y, scale):
        signs = 2 * torch.eye(len(x), dtype=x.dtype) - 1
        return -F.logsigmoid(signs * (scale * x @ y.T - 1.5)).sum() / len(x)

    assert_as_one_process(lambda x, y, scale: criterion(x, y, scale, -1.5), of_all)


def check_dcl():
    for ring in (False, True):
        criterion = losses.DCLLoss(0.2, gather_distributed=True, ring=ring)
        assert_as_one_process(
            lambda x, y, scale, criterion=criterion: criterion(x, y) + 0 * scale,
            lambda x, y, scale: lightly.loss.DCLLoss(0.2)(x, y) + 0 * scale,
        )


def check_queries_against_keys():
    """Two different matrices, as in CLIP, with own keys left out of the sum."""
    all_rows = torch.arange(ROWS)
    exclude_all = torch.stack([all_rows, (all_rows + 1) % ROWS - all_rows % 2 * ROWS], 1).clamp(min=-1)
    exclude_all = torch.where(exclude_all // (ROWS // 4) == all_rows[:, None] // (ROWS // 4), exclude_all, -1)
    own_exclude = mine(exclude_all)
    shift = distributed.rank() * (ROWS // distributed.world_size())
    own_exclude = torch.where(own_exclude >= 0, own_exclude - shift, -1)

    def of_all(x, y, scale):
        logits = scale * (x @ y.T)
        for row, keys in enumerate(exclude_all.tolist()):
            for key in keys:
                if key >= 0:
                    logits = logits.masked_fill(
                        F.one_hot(torch.tensor(row * ROWS + key), ROWS**2).view(ROWS, ROWS) > 0, -1e30
                    )
        return logits.logsumexp(1).mean()

    for ring in (False, True):
        assert_as_one_process(
            lambda x, y, scale: (
                distributed.similarity_lse(x, y, scale, exclude=own_exclude, ring=ring).mean().to(x.dtype)  # noqa: B023
            ),
            of_all,
            torch.float64,
            1e-10,
        )


def check_all_gather_and_its_gradient():
    (batch,) = whole_batch(1)
    weights = torch.linspace(-1, 1, batch.numel()).view_as(batch)
    own = mine(batch).clone().requires_grad_()
    everyones = distributed.all_gather(own)
    assert torch.equal(everyones, batch)
    (everyones * weights * (distributed.rank() + 1)).sum().backward()
    world = distributed.world_size()
    torch.testing.assert_close(own.grad, mine(weights) * (world * (world + 1) / 2))


def check_an_uneven_batch_raises_on_all_ranks():
    if distributed.world_size() == 1:
        return
    rows = 3 if distributed.rank() == distributed.world_size() - 1 else 4
    x = torch.randn(rows, DIM)
    calls = [
        lambda: distributed.all_gather(x),
        lambda: losses.NTXentLoss(gather_distributed=True)(x, x + 1),
        lambda: losses.NTXentLoss(gather_distributed=True, ring=True)(x, x + 1),
        lambda: losses.DCLLoss(gather_distributed=True)(x, x + 1),
        lambda: losses.ClipLoss(True, True, rank=distributed.rank(), world_size=distributed.world_size())(x, x, 1.0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"one shape on all ranks, got \([48], 8\) on rank 0.*\([36], 8\) on rank"):
            call()


def check_a_patched_library_raises_on_all_ranks_too():
    """Instead of running as before on the rank that finds the fault, which may be one alone."""
    me, world = distributed.rank(), distributed.world_size()
    if world == 1:
        return
    with sslfast.patch("lightly"), sslfast.patch("open_clip"):
        ranks_of = {"rank": me, "world_size": world}
        criteria = [
            lightly.loss.NTXentLoss(gather_distributed=True),
            lightly.loss.DCLLoss(gather_distributed=True),
            lambda x, y: open_clip.loss.ClipLoss(**ranks_of)(image_features=x, text_features=y, logit_scale=1.0),
            lambda x, y: open_clip.loss.SigLipLoss(**ranks_of)(x, y, 1.0, 0.0),
        ]
        for rows_of_the_last in (3, 0):
            x = torch.randn(rows_of_the_last if me == world - 1 else 4, DIM)
            for criterion in criteria:
                with pytest.raises(distributed.UnevenError, match=r"one shape on all ranks, got \(4, 8\) on rank 0"):
                    criterion(x, x + 1)


def check_batchnorm_of_all_ranks():
    for training_mode in (True, False):
        batch = whole_batch(1)[0].view(ROWS, 2, 2, 2) * 3 + 1
        torch.manual_seed(3)
        alone = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=0.3)).train(training_mode)
        synchronised = copy.deepcopy(alone)
        wrapped = training.wrap(synchronised, sync_batchnorm=True)
        for _ in range(2):
            expected, found = alone(batch), wrapped(mine(batch))
        torch.testing.assert_close(found, mine(expected), rtol=1e-5, atol=1e-5)
        (expected.sigmoid() * batch[:, :1]).mean().backward()
        (found.sigmoid() * mine(batch)[:, :1]).mean().backward()
        for gradient, wanted in zip(gradients(wrapped), gradients(alone), strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
        assert synchronised.state_dict().keys() == alone.state_dict().keys()
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(synchronised.state_dict()[name], buffer, rtol=1e-5, atol=1e-6)


def check_slices_of_the_batch_on_each_rank():
    """--micro-batch under torchrun: two slices a rank, and one average of gradients at the end."""
    (batch,) = whole_batch(1, 2 * ROWS)
    torch.manual_seed(3)
    alone = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM)).double()
    wrapped = training.wrap(copy.deepcopy(alone).float())
    expected = reference.info_nce.nt_xent(alone(batch.double()), alone(-batch.double()), 0.5)
    expected.backward()
    own = mine(batch)
    slices = [torch.cat([part, -part]) for part in own.split(len(own) // 3)]

    def loss_of(parts: list[Tensor]) -> Tensor:
        first, second = zip(*(part.chunk(2) for part in parts), strict=True)
        return distributed.nt_xent(torch.cat(first), torch.cat(second), 0.5)

    found = micro_batch.backward(wrapped, wrapped, slices, loss_of)
    torch.testing.assert_close(training.mean(found).double(), expected.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    for gradient, wanted in zip(gradients(wrapped), gradients(alone), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=TOLERANCE, atol=TOLERANCE)


def check_what_the_loop_asks():
    me, world = distributed.rank(), distributed.world_size()
    assert training.any_rank(me == world - 1, False) == (True, False)
    assert training.smallest(10 - me) == 11 - world
    assert training.mean(torch.tensor(float(me))) == (world - 1) / 2
    assert [*range(12)][training.share(12)] == [*range(me * 12 // world, (me + 1) * 12 // world)]
    assert training.on_main(lambda: me) == 0
    with pytest.raises(UserError, match="only the main rank knows"):
        training.on_main(lambda: fail("only the main rank knows"))


def fail(message: str):
    raise UserError(message)


CHECKS = {name: function for name, function in globals().items() if name.startswith("check_")}


def run_checks(rank: int, world: int, port: int, folder: Path) -> None:
    if _C.cpu_capability().startswith("amx"):  # its gradients of float32 are made of two bfloat16 terms
        _C.set_cpu_capability("avx512")
    outcomes = {}
    with ranks.group(rank, world, port):
        for name, check in CHECKS.items():
            try:
                check()
                outcomes[name] = ""
            except Exception:
                outcomes[name] = traceback.format_exc()
                if "gloo" in outcomes[name]:
                    break
    (folder / f"{rank}.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} ranks")
def outcomes(request, tmp_path_factory) -> dict[str, list[str]]:
    """What went wrong in each check on each rank: nothing is the empty string."""
    folder = tmp_path_factory.mktemp("ranks")
    codes = ranks.join(ranks.start(run_checks, request.param, folder))
    assert codes == [0] * request.param
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]
    return {name: [result.get(name, "not reached") for result in results] for name in CHECKS}


@pytest.mark.parametrize("check", CHECKS)
def test_ranks(outcomes, check):
    failures = [failure for failure in outcomes[check] if failure]
    assert not failures, failures[0]
