"""The token file: what is read, and the one sentence for each thing that can be wrong."""

from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from kvstore.secret import SECRET_BYTES_MAX, read_secret


def token_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    file = folder / "token"
    file.write_bytes(content)
    file.chmod(mode)
    return file


def test_space_around_it_is_not_part_of_it(tmp_path: Path) -> None:
    assert read_secret(token_file(tmp_path, b" hush \n")) == "hush"


def test_the_group_may_read_it(tmp_path: Path) -> None:
    assert read_secret(token_file(tmp_path, b"hush", 0o440)) == "hush"


def test_no_file_is_no_secret() -> None:
    assert read_secret(None) is None


@pytest.mark.parametrize(
    ("content", "mode", "sentence"),
    [
        (b"", 0o600, "is empty"),
        (b" \n", 0o600, "is empty"),
        (b"x" * (SECRET_BYTES_MAX + 1), 0o600, "over 4096 bytes"),
        (b"two\nlines", 0o600, "one line"),
        ("zażółć".encode(), 0o600, "one line"),
        (b"hush", 0o604, "chmod 600"),
        (b"hush", 0o602, "chmod 600"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: bytes, mode: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_secret(token_file(tmp_path, content, mode))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for file in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match=f"cannot read the token file {file}"):
            read_secret(file)
