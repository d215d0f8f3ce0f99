"""The command line: help that names every option, and errors without a traceback."""

import dataclasses
import subprocess
import sys

import pytest

from sslfast.cli import COMMANDS, main
from sslfast.methods.moco import MoCo
from sslfast.methods.simclr import SimCLR
from sslfast.methods.ssgan import SSGAN


def sslfast(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "sslfast", *args], capture_output=True, text=True, timeout=120)


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in COMMANDS)


def test_without_a_command_it_shows_the_help_as_wrong_usage(capsys):
    assert main([]) == 2
    assert "sslfast COMMAND" in capsys.readouterr().out


def test_unknown_command(capsys):
    assert main(["simlcr"]) == 2
    assert "no command 'simlcr'" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "settings"), [("simclr", SimCLR), ("moco", MoCo), ("ssgan", SSGAN)])
def test_help_of_a_method_explains_every_option(method, settings, capsys):
    with pytest.raises(SystemExit) as stop:
        main([method, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in said for field in dataclasses.fields(settings))
    assert f"sslfast {method} --data fashion-mnist --epochs 10" in said


def test_help_of_evaluate(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--help"])
    assert stop.value.code == 0
    assert "--map-samples" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [["--epochs", "many"], ["--encoder", "vgg"], ["--no-such-option"]], ids=" ".join)
def test_bad_options_are_wrong_usage(bad, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["simclr", *bad])
    assert stop.value.code == 2
    assert bad[0].strip("-").split("-")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["simclr", "--data", "/nowhere"], "there is no such directory"),
        (["simclr", "--resume", "/nowhere"], "/nowhere holds no run"),
        (["evaluate", "/nowhere"], "/nowhere holds no run"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_a_sentence(args, message, capsys):
    assert main(args) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith(f"sslfast {args[0]}: ")


def test_info(capsys):
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


def test_as_a_process():
    result = sslfast("simclr", "--data", "/nowhere")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "/nowhere" in result.stderr
