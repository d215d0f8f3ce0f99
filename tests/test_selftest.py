"""The command `sslfast selftest` finds what is wrong, and says so."""

import pytest
import torch

from sslfast import _C, cli, selftest


def test_all_kernels_are_right(capsys):
    assert cli.main(["selftest"]) == 0
    printed = capsys.readouterr().out
    assert "All kernels of this machine are right" in printed
    assert "WRONG" not in printed
    for name in (*selftest.CHECKS, *_C.available_cpu_capabilities()):
        assert name in printed


@pytest.mark.parametrize("op", list(selftest.CHECKS))
@pytest.mark.parametrize("fault", ["off by one", "nan", "raises"])
def test_a_wrong_kernel_is_named(op, fault, monkeypatch, capsys):
    name = {"diffusion": "diffusion_loss_forward", "info_nce": "nt_xent"}.get(op, f"{op}_forward")
    kernel = getattr(_C, name)

    def broken(*args):
        if fault == "raises":
            raise RuntimeError("this kernel is broken")
        result = kernel(*args)
        first = result if isinstance(result, torch.Tensor) else result[0]
        if fault == "off by one":
            first.add_(1)
        else:
            first.fill_(float("nan") if first.is_floating_point() else 255)
        return result

    monkeypatch.setattr(_C, name, broken)
    monkeypatch.setattr(selftest, "CHECKS", {op: selftest.CHECKS[op]})
    before = _C.cpu_capability()
    with pytest.raises(SystemExit) as exit:
        selftest.main([])
    assert exit.value.code == 1
    assert _C.cpu_capability() == before
    printed = capsys.readouterr().out
    assert f"{op} on {before}" in printed
    assert "Please report it" in printed
    assert "compiler:" in printed  # what `sslfast info` says
    assert ("this kernel is broken" in printed) == (fault == "raises")


def test_has_no_options():
    with pytest.raises(SystemExit, match="usage: sslfast selftest"):
        selftest.main(["--all"])
