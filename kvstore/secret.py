"""The secret of a tier, from the file that the setting `token_file` names.

Covers: reading it, alike for nodes, their bulk processes, clients and commands, and one sentence
for whatever is wrong with the file. Does not cover: the secret of a tier's own Ray
(`kvstore.state`), how a caller shows the secret (`kvstore.rpc.wire`, `kvstore.transport.frame`).
"""

import os
import stat
from pathlib import Path

from kvstore.errors import ConfigError

SECRET_BYTES_MAX = 4096
"""It is sent along with every call."""


def read_secret(file: Path | None) -> str | None:
    """What callers must show; none where no file is named. Raises ConfigError.

    The file's group may read it, which is how a container gets one; others may not.
    """
    if file is None:
        return None
    try:
        with file.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            content = stream.read(SECRET_BYTES_MAX + 1).strip()
    except OSError as error:
        raise ConfigError(
            f"cannot read the token file {file} ({error.strerror}): make it, or name another with "
            "token_file"
        ) from None
    if mode & stat.S_IRWXO:
        raise ConfigError(f"everybody on this machine can read the token file: chmod 600 {file}")
    if not content or len(content) > SECRET_BYTES_MAX:
        state = "is empty" if not content else f"has over {SECRET_BYTES_MAX} bytes"
        raise ConfigError(
            f"the token file {file} {state}: fill it, as with `openssl rand -hex 32 > {file}`"
        )
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError:
        text = ""
    if not text.isprintable() or not text:
        raise ConfigError(f"the token file {file} must hold one line of plain characters")
    return text
