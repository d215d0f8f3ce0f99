"""Make an installed library faster: `sslfast.patch("lightly")` gives its losses our kernels, and back again.

Only the method that computes is exchanged, in the class itself. So it makes no difference under which name a script
knows the class, or whether it imported it, subclassed it or made objects of it before; `isinstance`, pickles and
checkpoints stay as they were.
"""

import functools
import importlib
import logging
import pkgutil
from collections import Counter
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from sslfast import distributed, losses

log = logging.getLogger("sslfast")


class Unsupported(Exception):
    """Why our kernels cannot do what an object was asked for; its library then does it as before."""


def patch(library: str) -> "Patch":
    """Give a library's losses our kernels until `undo()` is called on the result, or the `with` block is left.

    >>> import lightly, sslfast
    >>> sslfast.patch("lightly")  # from here on lightly.loss.NTXentLoss is fast, wherever it is used

    Results are the library's own, up to rounding. What our kernels do not support runs as before, after one sentence
    in the log "sslfast" that says why. So does a subclass that changes more than its constructor and `forward`.
    Patching twice is patching once, and the last undo counts.

    Args:
        library: the name of a module: "lightly", "open_clip", "pytorch_metric_learning", "info_nce" or "diffusers"
            (the steps of its DDPMScheduler and DDIMScheduler).

    Raises:
        ValueError: a library that we know no faster form of.
        ModuleNotFoundError: a library that is not installed.
    """
    if library not in FASTER:
        raise ValueError(f"library: expected one of {', '.join(map(repr, FASTER))}, got {library!r}")
    try:
        importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ModuleNotFoundError(f"library: {library!r} is not installed here", name=library) from None
    return Patch(library)


class Patch:
    """What `patch` returns: undoes it, and works as a context manager."""

    def __init__(self, library: str):
        self.library, self.undone = library, False
        if _active[library] == 0:
            _replaced[library] = [_exchange(place, fast) for place, fast in FASTER[library].items()]
        _active[library] += 1

    def undo(self) -> None:
        """Take the patch back. The library's own code returns when all patches of it are undone; twice is once."""
        if self.undone:
            return
        self.undone = True
        _active[self.library] -= 1
        if _active[self.library] == 0:
            for restore in _replaced.pop(self.library):
                restore()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<sslfast.patch({self.library!r}){', undone' if self.undone else ''}>"


_active: Counter[str] = Counter()
_replaced: dict[str, list[Callable[[], None]]] = {}


def _exchange(place: str, fast: Callable) -> Callable[[], None]:
    """Put `fast` into a place such as "lightly.loss.dcl_loss:DCLLoss.forward"; return a function that undoes it."""
    path, _, name = place.rpartition("." if "." in place.partition(":")[2] else ":")
    called = place.replace(":", ".")
    try:
        owner = pkgutil.resolve_name(path)
        original = getattr(owner, name)
    except (ImportError, AttributeError):
        log.warning("%s does not exist in the version that is installed: it is left out", called)
        return lambda: None
    inherited = name not in vars(owner)

    @functools.wraps(original)
    def replacement(*args, **kwargs):
        try:
            if isinstance(owner, type) and not _computes_like(type(args[0]), owner, name):
                raise Unsupported("a subclass that changes how it computes")
            return fast(*args, **kwargs)
        except distributed.UnevenError:
            raise  # on all ranks: a rank that went on would wait for the others
        except (Unsupported, NotImplementedError, TypeError, ValueError) as reason:
            _say_once(f"{called} runs as before: {reason}")
        return original(*args, **kwargs)

    setattr(owner, name, replacement)

    def restore():
        if vars(owner).get(name) is not replacement:
            log.warning("%s was replaced by someone else meanwhile: it stays as it is", called)
        elif inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, original)

    return restore


_said: set[str] = set()


def _say_once(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        log.warning("%s", sentence)


def _computes_like(kind: type, base: type, method: str) -> bool:
    """Whether a class has all that `base` has, but for its constructor and `method`, which may call super()."""
    if kind is base:
        return True
    names = {name for parent in base.__mro__ if parent not in nn.Module.__mro__ for name in vars(parent)}
    names -= {name for name in names if name == method or name.startswith("__")}
    return all(getattr(kind, name) is getattr(base, name) for name in names)


def _check_even(rows: Tensor, gathered: bool) -> None:
    """Raise on all ranks, before one of them alone finds fault with its rows and leaves the others waiting."""
    if gathered and distributed.world_size() > 1 and isinstance(rows, Tensor):
        distributed.check_same_shape(rows)


def _lightly_nt_xent(loss, out0: Tensor, out1: Tensor) -> Tensor:
    _check_even(out0, loss.gather_distributed)
    if loss.memory_bank.size[0] == 0:
        return losses.NTXentLoss(loss.temperature, 0, loss.gather_distributed)(out0, out1)
    info_nce = losses.InfoNCE(loss.temperature)
    keys, bank = loss.memory_bank(F.normalize(out1, dim=1), update=out0.requires_grad)
    return info_nce(out0, keys, bank.T)


def _lightly_dcl(loss, out0: Tensor, out1: Tensor) -> Tensor:
    _check_even(out0, loss.gather_distributed)
    return losses.DCLLoss(loss.temperature, loss.weight_fn, loss.gather_distributed)(out0, out1)


def _open_clip_clip(loss, image_features: Tensor, *args, **kwargs) -> Tensor | dict[str, Tensor]:
    _check_even(image_features, loss.world_size > 1)
    faster = losses.ClipLoss(
        local_loss=loss.local_loss,
        gather_with_grad=loss.gather_with_grad,
        rank=loss.rank,
        world_size=loss.world_size,
        use_horovod=loss.use_horovod,
    )
    return faster(image_features, *args, **kwargs)


def _open_clip_siglip(loss, image_features: Tensor, *args, **kwargs) -> Tensor | dict[str, Tensor]:
    _check_even(image_features, loss.world_size > 1)
    faster = losses.SigLipLoss(rank=loss.rank, world_size=loss.world_size, dist_impl=loss.dist_impl)
    return faster(image_features, *args, **kwargs)


def _metric_learning_sup_con(loss, *args, **kwargs) -> Tensor:
    from pytorch_metric_learning import distances, reducers

    if type(loss.distance) is not distances.CosineSimilarity or (loss.distance.p, loss.distance.power) != (2, 1):
        raise Unsupported(f"distance: only CosineSimilarity() is supported, got {loss.distance}")
    if type(loss.reducer) is not reducers.AvgNonZeroReducer:  # a regularizer makes it another one, too
        raise Unsupported(f"reducer: only AvgNonZeroReducer() is supported, got {loss.reducer}")
    if loss.collect_stats or loss.distance.collect_stats or loss.reducer.collect_stats:
        raise Unsupported("collect_stats: only False is supported")
    return losses.SupConLoss(loss.temperature)(*args, **kwargs)


def _info_nce_class(loss, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
    return losses.InfoNCE(loss.temperature, loss.reduction, loss.negative_mode)(query, positive_key, negative_keys)


def _info_nce_function(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    return losses.InfoNCE(temperature, reduction, negative_mode)(query, positive_key, negative_keys)


def _diffusers_step(name: str, *args, **kwargs):
    from sslfast.schedulers import _patched  # not before it is needed: it imports diffusers

    return getattr(_patched, name)(*args, **kwargs)


FASTER: dict[str, dict[str, Callable]] = {
    "lightly": {
        "lightly.loss.ntx_ent_loss:NTXentLoss.forward": _lightly_nt_xent,
        "lightly.loss.dcl_loss:DCLLoss.forward": _lightly_dcl,  # and of DCLWLoss, which inherits it
    },
    "open_clip": {
        "open_clip.loss:ClipLoss.forward": _open_clip_clip,
        "open_clip.loss:SigLipLoss.forward": _open_clip_siglip,
    },
    "pytorch_metric_learning": {
        "pytorch_metric_learning.losses.supcon_loss:SupConLoss.forward": _metric_learning_sup_con,
    },
    "info_nce": {
        "info_nce:InfoNCE.forward": _info_nce_class,
        "info_nce:info_nce": _info_nce_function,
    },
    "diffusers": {
        "diffusers.schedulers.scheduling_ddpm:DDPMScheduler.step": functools.partial(_diffusers_step, "ddpm_step"),
        "diffusers.schedulers.scheduling_ddim:DDIMScheduler.step": functools.partial(_diffusers_step, "ddim_step"),
    },
}
"""By library: the places whose functions are exchanged, and what takes their place."""
