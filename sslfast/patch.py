"""Make an installed library faster: `sslfast.patch("lightly")` gives its losses our kernels, and back again.

Only the method that computes is exchanged, in the class itself. So it makes no difference under which name a script
knows the class, or whether it imported it, subclassed it or made objects of it before; `isinstance`, pickles and
checkpoints stay as they were.
"""

import functools
import importlib
import inspect
import logging
import pkgutil
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslfast import distributed, losses
from sslfast.losses._common import within_autocast
from sslfast.losses.supcon import check_defaults

log = logging.getLogger("sslfast")


class Unsupported(Exception):
    """Why our kernels cannot do what an object was asked for; its library then does it as before."""


def patch(library: str) -> "Patch":
    """Give a library's losses our kernels until `undo()` is called on the result, or the `with` block is left.

    >>> import lightly, sslfast
    >>> sslfast.patch("lightly")  # from here on lightly.loss.NTXentLoss is fast, wherever it is used

    Results are the library's own, up to rounding, and have its dtypes. What our kernels do not support runs as before,
    after one sentence in the log "sslfast" that says why. So does a subclass that changes more than its constructor and
    `forward`. What is an error in ours alone is never one of yours.
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
            if isinstance(owner, type):
                _check_unchanged(args[0], owner, name)
            return fast(*args, **kwargs)
        except distributed.UnevenError:
            raise  # on all ranks: a rank that went on would wait for the others
        except Unsupported as reason:
            _say_once(f"{called} runs as before: {reason}")
        except Exception as error:  # whatever it is, the library's own code is the answer, or has the better error
            _say_once(f"{called} runs as before: {str(error) or type(error).__name__}")
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


@functools.cache
def _parts(base: type, method: str) -> frozenset[str]:
    """The names of all that a class computes with besides `method`."""
    names = {name for parent in base.__mro__ if parent not in nn.Module.__mro__ for name in vars(parent)}
    return frozenset(name for name in names if name != method and not name.startswith("__"))


def _same_parts(kind: type, base: type, method: str) -> bool:
    static = inspect.getattr_static  # getattr would bind class methods anew each time
    return kind is base or all(static(kind, name) is static(base, name) for name in _parts(base, method))


def _check_unchanged(obj: object, base: type, method: str) -> None:
    """Raise unless an object computes as `base` does; its constructor and `method` may differ, and call super()."""
    if not _parts(base, method).isdisjoint(vars(obj)) or not _same_parts(type(obj), base, method):
        raise Unsupported("a subclass that changes how it computes")
    parts = obj.children() if isinstance(obj, nn.Module) else ()
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        raise Unsupported("a part of it has forward hooks")


def _dtype(compute: Callable[..., Tensor], *given) -> torch.dtype:
    """The dtype that a library's result has, within torch.autocast or not; `compute` is asked with one number each."""
    tensors = [t for t in given if isinstance(t, Tensor)]
    if not within_autocast(tensors[0]) and {t.dtype for t in tensors} in ({torch.float32}, {torch.float64}):
        return tensors[0].dtype
    with torch.no_grad():
        return compute(*(t.new_ones((1,) * t.dim()) if isinstance(t, Tensor) else t for t in given)).dtype


def _cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device=logits.device))


def _check_even(rows: Tensor, gathered: bool) -> None:
    """Raise on all ranks, before one of them alone finds fault with its rows and leaves the others waiting."""
    if gathered and distributed.world_size() > 1 and isinstance(rows, Tensor):
        distributed.check_same_shape(rows)


def _lightly_nt_xent(loss, out0: Tensor, out1: Tensor) -> Tensor:
    _check_even(out0, loss.gather_distributed)
    entropy = loss.cross_entropy
    changed = type(entropy) is not nn.CrossEntropyLoss or entropy.weight is not None or entropy.ignore_index >= 0
    if changed or (entropy.reduction, entropy.label_smoothing) != ("mean", 0):
        raise Unsupported(f"cross_entropy: only CrossEntropyLoss() is supported, got {entropy}")
    if loss.memory_bank.size[0] == 0:
        dtype = _dtype(lambda a, b: _cross_entropy(a @ b.mT), out0, out1)
        return losses.NTXentLoss(loss.temperature, 0, loss.gather_distributed)(out0, out1).to(dtype)
    from lightly.models.modules.memory_bank import MemoryBankModule

    _check_unchanged(loss.memory_bank, MemoryBankModule, "forward")
    if type(loss.memory_bank) is not MemoryBankModule or not loss.memory_bank.feature_dim_first:
        raise Unsupported(f"memory_bank: only a MemoryBankModule of lightly is supported, got {loss.memory_bank}")
    put = loss.memory_bank._dequeue_and_enqueue
    keys, bank = loss.memory_bank(F.normalize(out1, dim=1), update=False)
    dtype = _dtype(lambda a, b, k: _cross_entropy(torch.cat([(a @ b.mT), a @ k], 1)[:, :1]), out0, out1, bank)
    found = losses.InfoNCE(loss.temperature)(out0, keys, bank.T).to(dtype)
    if out0.requires_grad:  # last, when nothing can go wrong any more
        put(keys)
    return found


def _lightly_dcl(loss, out0: Tensor, out1: Tensor) -> Tensor:
    _check_even(out0, loss.gather_distributed)
    dtype = _dtype(lambda a, b: (a @ b.mT).logsumexp(1).mean(), out0, out1)
    dtypes = [dtype]

    def weigh(a: Tensor, b: Tensor) -> Tensor:
        weights = loss.weight_fn(a.to(out0.dtype), b.to(out1.dtype))
        dtypes.append(weights.dtype)
        return weights

    faster = losses.DCLLoss(loss.temperature, weigh if loss.weight_fn else None, loss.gather_distributed)
    found = faster(out0, out1)
    return found.to(functools.reduce(torch.promote_types, dtypes))


def _open_clip_clip(
    loss,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    output_dict: bool = False,
) -> Tensor | dict[str, Tensor]:
    _check_even(image_features, loss.world_size > 1)
    dtype = _dtype(lambda a, b, s: _cross_entropy(s * a @ b.mT), image_features, text_features, logit_scale)
    faster = losses.ClipLoss(
        local_loss=loss.local_loss,
        gather_with_grad=loss.gather_with_grad,
        rank=loss.rank,
        world_size=loss.world_size,
        use_horovod=getattr(loss, "use_horovod", False),  # which newer versions have no more
    )
    found = faster(image_features, text_features, logit_scale, logit_bias).to(dtype)
    return {"contrastive_loss": found} if output_dict else found


def _open_clip_siglip(
    loss,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    output_dict: bool = False,
) -> Tensor | dict[str, Tensor]:
    _check_even(image_features, loss.world_size > 1)
    chunks = getattr(loss, "chunk_size", 0) > 0  # which older versions have not
    dtype = _dtype(
        lambda a, b, s: F.logsigmoid(s * a @ b.mT if chunks else a * (s * a @ b.mT)).sum(),
        image_features,
        text_features,
        logit_scale,
    )
    faster = losses.SigLipLoss(rank=loss.rank, world_size=loss.world_size, dist_impl=loss.dist_impl)
    found = faster(image_features, text_features, logit_scale, logit_bias)
    found = found.to(torch.promote_types(dtype, torch.float32) if chunks else dtype)
    return {"contrastive_loss": found} if output_dict else found


def _metric_learning_sup_con(
    loss,
    embeddings: Tensor,
    labels: Tensor | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor:
    check_defaults(loss.distance, loss.reducer, loss.embedding_regularizer, loss.collect_stats)
    keys = embeddings if ref_emb is None else ref_emb

    def like_theirs(a: Tensor, b: Tensor) -> Tensor:
        logits = a @ b.mT
        return (logits * (logits - logits.logsumexp(1))).sum(1).mean()

    dtype = _dtype(like_theirs, embeddings, keys)
    faster = losses.SupConLoss(loss.temperature)
    return faster(embeddings, labels, indices_tuple, ref_emb, ref_labels).to(dtype)


def _info_nce_class(loss, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
    return _info_nce_function(query, positive_key, negative_keys, loss.temperature, loss.reduction, loss.negative_mode)


def _info_nce_function(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    def like_theirs(q: Tensor, p: Tensor, n: Tensor | None) -> Tensor:
        if n is None:
            return _cross_entropy(q @ p.mT)
        return _cross_entropy(torch.cat([q * p, q @ n.view(1, 1)], 1))

    dtype = _dtype(like_theirs, query, positive_key, negative_keys)
    return losses.InfoNCE(temperature, reduction, negative_mode)(query, positive_key, negative_keys).to(dtype)


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
