"""Two prompts: one that a test deletes, and one that it keeps."""

from kvstore.client import Samovar
from tests.hold import prompts
from tests.hold.prompts import fetched

TOKENS = 160
BLOCKS = 10
GONE, KEPT = 1, 2
SPACE = prompts.namespace()


def finds_what_was_kept(reader: Samovar) -> bool:
    return fetched(reader, KEPT, TOKENS) == TOKENS
