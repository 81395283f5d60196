"""The commands about blocks, against nodes behind real ports."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.cli_options import duration
from tests.served import Served, put_on, some_keys
from tests.unit.command_line import Run, refuses, samovar
from tests.worlds import shared_folder

KEYS = some_keys(3)
HEX = [key.tobytes().hex() for key in KEYS]
COMMANDS = ("delete", "hold", "release", "erase", "inspect")


@pytest.fixture
def served() -> Iterator[Served]:
    with shared_folder() as folder:
        node = Served(folder, index=1)
        node.join(node)
        put_on(node, KEYS)
        yield node
        node.stop()


@pytest.fixture
def run(served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Against the node."""
    monkeypatch.setenv("SAMOVAR_ADDRESS", served.address)
    return samovar(monkeypatch, capsys)


def last_line(output: str) -> Any:
    return json.loads(output.splitlines()[-1])


def test_help_teaches(run: Run) -> None:
    for command in COMMANDS:
        code, output, _ = run(command, "--help")
        assert code == 0
        assert "--address" in output
        assert "Exit code 1" in output
        assert "--arena-bytes" not in output
    _, output, _ = run("--help")
    assert "..." not in output.partition("Commands:")[2], "a command's line is cut off"


def test_delete_by_arguments_file_and_input(
    run: Run, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output, _ = run("delete", HEX[0], "--json")
    assert (code, last_line(output)) == (0, {"blocks": 1, "pending": []})
    assert "Deleted 1 block." in output
    chain = tmp_path / "chain"
    chain.write_text(f"{HEX[1]}\n\n")
    assert run("delete", "--chain", str(chain))[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{HEX[2]}\n{HEX[2].upper()}\n"))
    assert "Deleted 2 blocks." in run("delete", "--chain", "-")[1]
    assert served.call(served.node.stats).host.held_cells == 0


def test_hold_inspect_release(run: Run) -> None:
    code, output, _ = run("hold", "contract", *HEX, "--ttl", "1h", "--tenant", "law", "--json")
    assert (code, last_line(output)["outcome"]) == (0, "GRANTED")
    assert "contract: 3 blocks" in output
    assert "kept for 1h00m" in output
    code, output, _ = run("inspect", *HEX, "ab" * 32, "--json")
    assert code == 0
    assert "contract 1h00m" in output or "contract 59m59s" in output
    assert "nowhere" in output
    found = last_line(output)
    assert [block["key"] for block in found["nodes"]["node-1"]] == [*HEX, "ab" * 32]
    assert [block["arena_mask"] for block in found["nodes"]["node-1"]] == [1, 1, 1, 0]
    assert run("release", "contract")[0] == 1
    code, output, _ = run("release", "contract", "--tenant", "law", "--json")
    assert (code, last_line(output)) == (0, {"found": True, "silent": []})


def test_copies_are_asked_for_and_looked_at(run: Run) -> None:
    words = ("hold", "contract", *HEX, "--ttl", "1h", "--replicas", "2")
    code, output, _ = run(*words)
    assert code == 0
    assert "Another node gets a copy; samovar inspect says when it has it." in output
    _, output, _ = run("inspect", HEX[0], "--json")
    assert "(1 of 2 copies: the" in output
    (mark,) = last_line(output)["nodes"]["node-1"][0]["holds"]
    assert (mark["copies"], mark["replicas"], mark["state"]) == (1, 2, "UNDER_WAY")
    _, output, _ = run("hold", "alone", *HEX, "--ttl", "1h")
    assert "copy" not in output
    assert run("hold", "contract", *HEX, "--ttl", "1h", "--replicas", "3")[0] == 2


def test_what_is_declined_is_said_with_the_reason(run: Run) -> None:
    code, output, _ = run("hold", "contract", "ab" * 32, "--ttl", "5m", "--json")
    assert code == 1
    assert "declined: a block is not there: store it first" in output
    assert last_line(output)["outcome"] == "NOT_HELD"


def test_a_node_that_is_away_makes_it_pending(run: Run, served: Served, tmp_path: Path) -> None:
    away = Served(tmp_path, index=2)
    served.join(served, away, epoch=2)
    away.stop()
    code, output, _ = run("delete", HEX[0], "--json")
    assert (code, last_line(output)) == (1, {"blocks": 1, "pending": ["node-2"]})
    assert "node-2 did not confirm" in output
    code, output, _ = run("inspect", HEX[1])
    assert code == 1
    assert "No answer from node-2." in output
    code, output, _ = run("release", "nothing")
    assert code == 1
    assert "there it ends by itself" in output


def test_erase_counts_epochs(run: Run) -> None:
    for epoch in (1, 2):
        code, output, _ = run("erase", "somebody", "--json")
        assert (code, last_line(output)) == (0, {"epoch": epoch, "pending": []})
    assert "it is in epoch 2 now" in output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["delete"], "0 keys were named"),
        (["delete", "abc"], "is no block key: 64 hex digits are one"),
        (["inspect", "zz" * 32], "is no block key"),
        (["inspect", "--chain", "/nowhere"], "/nowhere"),
        (["hold", "name", HEX[0]], "--ttl"),
        (["hold", "name", HEX[0], "--ttl", "soon"], "is no time such as 90s"),
        (["hold", "name", HEX[0], "--ttl", "none"], "is no time such as 90s"),
        (["hold", "name", HEX[0], "--ttl", "400d"], "ttl_s must be"),
        (["hold", "", HEX[0], "--ttl", "1h"], "handle"),
        (["release"], "HANDLE"),
        (["delete", HEX[0], "--address", "127.0.0.1:1"], "did not answer"),
    ],
)
def test_bad_input_gets_one_sentence_and_code_2(
    run: Run, served: Served, words: list[str], sentence: str
) -> None:
    refuses(run, words, sentence)
    assert served.call(served.node.stats).host.held_cells == 3


@pytest.mark.parametrize(
    ("milliseconds", "words"),
    [(0, "0.0s"), (59_900, "59.9s"), (60_000, "1m00s"), (3_600_000, "1h00m"),
     (47 * 3_600_000, "47h00m"), (49 * 3_600_000, "2d01h")],
)  # fmt: skip
def test_times_are_for_people(milliseconds: int, words: str) -> None:
    assert duration(milliseconds) == words
