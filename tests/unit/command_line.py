"""`samovar` in this process, as a shell has it: words in; exit code, output and complaints out."""

import sys
from collections.abc import Callable

import pytest

from kvstore import cli

Run = Callable[..., tuple[int, str, str]]


def samovar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command, in the environment as it is then."""

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["samovar", *words])
        code = cli.main()
        output = capsys.readouterr()
        return code, output.out, output.err

    return command


def refuses(run: Run, words: list[str], sentence: str) -> None:
    """Bad input: one sentence, and code 2."""
    code, _, complaint = run(*words)
    assert code == 2
    assert sentence in complaint
    assert "Traceback" not in complaint
