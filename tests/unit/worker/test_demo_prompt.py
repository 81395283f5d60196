"""The demo's prompts share their document token by token."""

import numpy as np
import pytest

from kvstore.errors import UsageError
from worker.demo.prompt import CONTRACT_PATH, QUESTIONS, prompt_of


class Characters:
    """A tokenizer whose tokens are characters, with a chat format."""

    chat_template: str | None = "chat"

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert add_generation_prompt
        assert not tokenize
        return f"<u>{conversation[0]['content']}<a>"


def text(tokens: np.ndarray) -> str:
    return "".join(chr(token) for token in tokens)


def test_prompts_share_the_opening_and_the_document_and_nothing_else() -> None:
    one, other = (prompt_of(Characters(), "Clause.", asked) for asked in ("How?", "When?"))
    assert text(one.tokens) == "<u>Clause.\n\nHow?<a>"
    assert one.boundary == other.boundary == len("<u>Clause.\n\n")
    assert one.tokens[one.boundary] != other.tokens[other.boundary]
    np.testing.assert_array_equal(one.tokens[: one.boundary], other.tokens[: other.boundary])


def test_a_model_without_a_chat_format_is_asked_in_plain_text() -> None:
    tokenizer = Characters()
    tokenizer.chat_template = None
    assert text(prompt_of(tokenizer, "Clause.", "Who?").tokens).endswith("Who?\nAnswer:")


def test_refuses_a_question_that_would_not_be_a_short_tail() -> None:
    with pytest.raises(UsageError, match="ask a shorter one"):
        prompt_of(Characters(), "Clause.", "Why? " * 10)


def test_the_contract_has_answers_to_its_questions() -> None:
    contract = CONTRACT_PATH.read_text()
    assert len({question[0] for question in QUESTIONS}) == 2
    assert "third Batch, on or before 1 December, with 70 Units" in contract
    assert "The price of one Unit is 1,870 crowns" in contract
