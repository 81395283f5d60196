"""The demo's prompts: one contract, two questions about it, in the model's own chat format.

    [ chat opening | contract | blank line ][ question | chat closing ]
                                           └ boundary: all that both prompts share, where a tail
                                             block may end

The two parts are tokenised apart, so that the shared part has the same token ids whatever follows.
The questions differ from their first token on, so that a worker which continues its own cache runs
as many tokens as one which has the shared part from the tier.

Does not cover: the model (see ``worker.demo.model``).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kvstore.errors import UsageError
from kvstore.key import Tokens, as_tokens

CONTRACT_PATH = Path(__file__).with_name("contract.md")
QUESTIONS = (
    "How many Units does the third Batch have?",
    "What is the price of one Unit, in which currency, and within how many days must an invoice be "
    "paid?",
)
QUESTION_TOKENS_MAX = 32


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's token ids, and how many of them are the document that prompts share."""

    tokens: Tokens
    boundary: int


def prompt_of(tokenizer: Tokenizer, document: str, question: str) -> Prompt:
    """The prompt that asks ``question`` about ``document``."""
    opening, closing = _chat(tokenizer, document, question)
    shared = tokenizer.encode(opening, add_special_tokens=False)
    asked = tokenizer.encode(closing, add_special_tokens=False)
    if len(asked) > QUESTION_TOKENS_MAX:
        raise UsageError(
            f"the question has {len(asked)} tokens, over {QUESTION_TOKENS_MAX}: ask a shorter one"
        )
    return Prompt(as_tokens(np.array(shared + asked)), boundary=len(shared))


def _chat(tokenizer: Tokenizer, document: str, question: str) -> tuple[str, str]:
    """The prompt's text, cut behind the document."""
    shared = f"{document}\n\n"
    if not tokenizer.chat_template:
        return f"{shared}Question: ", f"{question}\nAnswer:"
    message = {"role": "user", "content": f"{shared}{question}"}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    before, found, after = str(text).partition(shared)
    if not found:
        raise UsageError("the model's chat template changes the document: name another model")
    return before + shared, after
