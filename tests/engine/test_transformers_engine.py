"""The transformers engine on tiny random models: bits, counts, sources and refusals."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvstore.clock import ManualClock
from kvstore.errors import UsageError
from kvstore.key import Tokens
from tests.engine.tiny import other_model, tiny_model
from tests.unit.worker.fakes import FakePlan, MemoryTier
from worker.connector import Abandoned, Connector, Request
from worker.engines.sampling import Sampler, Sampling
from worker.engines.transformers import (
    TransformersEngine,
    layout_for,
    load_model,
    numerics_of,
)
from worker.geometry import Attention, grid_of, namespace_of

pytestmark = pytest.mark.engine
BLOCK, CAPACITY, PROMPT_TOKENS = 16, 192, 100
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module", params=DTYPES, ids=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def prompt() -> Tokens:
    return np.random.default_rng(3).integers(0, 300, PROMPT_TOKENS).astype(np.int32)


@pytest.fixture
def tier() -> MemoryTier:
    return MemoryTier(layers=3)


EngineFor = Callable[..., TransformersEngine]


@pytest.fixture
def engine_for(tier: MemoryTier) -> Iterator[EngineFor]:
    """Makes engines that share ``tier``, or have none."""
    engines: list[TransformersEngine] = []
    connectors: list[Connector[FakePlan]] = []

    def make(model: PreTrainedModel, tier: MemoryTier | None = tier) -> TransformersEngine:
        connector = None
        if tier is not None:
            layout = layout_for(model)
            grid = grid_of(layout, BLOCK)
            namespace = namespace_of(model.config, grid, layout, "tiny", numerics_of(model))
            connector = Connector(tier, namespace, ManualClock())
            connectors.append(connector)
        engines.append(TransformersEngine(model, ManualClock(), connector, CAPACITY))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    for connector in connectors:
        connector.close()


def other_question(prompt: Tokens, boundary: int) -> Tokens:
    """Another prompt with the same first ``boundary`` tokens."""
    other = prompt.copy()
    other[boundary:] = (other[boundary:] + 1) % 300
    return other


def reference(model: PreTrainedModel, prompt: Tokens, new_tokens: int) -> list[int]:
    """Greedy tokens by plain transformers, with its own cache."""
    cache = DynamicCache(config=model.config)
    ids, chosen = torch.from_numpy(prompt.astype(np.int64))[None], []
    with torch.inference_mode():
        for _ in range(new_tokens):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            chosen.append(int(output.logits[0, -1].argmax()))
            ids = torch.tensor([chosen[-1:]])
    return chosen


def assert_same_greedy(
    tokens: tuple[int, ...], cold: tuple[int, ...], gaps: tuple[float, ...]
) -> None:
    """Equal, or differing first where the cold run's two best logits were as good as equal."""
    for at, (token, expected) in enumerate(zip(tokens, cold, strict=True)):
        if token != expected:
            print(f"token {at} differs at a top-2 logit gap of {gaps[at]:.2e}")
            assert gaps[at] < 1e-3
            return


def test_cold_is_what_plain_transformers_gives(engine_for: EngineFor, prompt: Tokens) -> None:
    model = tiny_model(torch.float32)
    completion = engine_for(model, None).generate(prompt, 12)
    assert list(completion.tokens) == reference(model, prompt, 12)
    report = completion.report
    assert (report.prefilled_tokens, report.cached_tokens) == (PROMPT_TOKENS, 0)


# Inside a block, one before its end, at its end, and just behind it.
@pytest.mark.parametrize("boundary", [71, 79, 80, 81])
def test_warm_logits_equal_an_own_hit_bit_for_bit(
    engine_for: EngineFor,
    tier: MemoryTier,
    model: PreTrainedModel,
    prompt: Tokens,
    boundary: int,
) -> None:
    producer, reader = engine_for(model), engine_for(model)
    second = other_question(prompt, boundary)
    producer.generate(prompt, 4, boundaries=(boundary,))
    producer.flush()
    tier.full = True
    warm = reader.generate(second, 8, boundaries=(boundary,))
    own = producer.generate(second, 8, boundaries=(boundary,))
    assert (own.report.own_tokens, own.report.local_tokens) == (boundary, 0)
    assert (warm.report.own_tokens, warm.report.local_tokens) == (0, boundary)
    assert own.report.prefilled_tokens == warm.report.prefilled_tokens == PROMPT_TOKENS - boundary
    assert torch.equal(reader.prefill_logits, producer.prefill_logits)
    assert warm.tokens == own.tokens
    assert warm.gaps == own.gaps


@pytest.mark.parametrize(
    ("kind", "attentions"),
    [
        ("gpt2", {Attention.MHA}),
        ("qwen3", {Attention.GQA}),
        ("deepseek", {Attention.MLA, Attention.MHA}),  # older transformers cache it per head
    ],
)
def test_other_architectures_are_warm_in_the_same_bits(
    engine_for: EngineFor, tier: MemoryTier, prompt: Tokens, kind: str, attentions: set[Attention]
) -> None:
    model = other_model(kind)
    assert layout_for(model).attention in attentions
    tier.layers = 2
    producer, reader = engine_for(model), engine_for(model)
    second = other_question(prompt, 71)
    producer.generate(prompt, 4, boundaries=(71,))
    producer.flush()
    tier.full = True
    warm = reader.generate(second, 4, boundaries=(71,))
    own = producer.generate(second, 4, boundaries=(71,))
    assert warm.report.local_tokens == own.report.own_tokens == 71
    assert torch.equal(reader.prefill_logits, producer.prefill_logits)
    assert warm.tokens == own.tokens


@pytest.mark.parametrize("boundary", [71, 80, 81])
def test_warm_gives_the_greedy_tokens_of_cold(
    engine_for: EngineFor, prompt: Tokens, boundary: int
) -> None:
    model = tiny_model(torch.float32)
    second = other_question(prompt, boundary)
    producer, reader = engine_for(model), engine_for(model)
    producer.generate(prompt, 1, boundaries=(boundary,))
    producer.flush()
    warm = reader.generate(second, 16, boundaries=(boundary,))
    cold = engine_for(model, None).generate(second, 16)
    assert warm.report.local_tokens == boundary
    assert_same_greedy(warm.tokens, cold.tokens, cold.gaps)


def test_generated_tokens_are_stored_but_never_the_last(
    engine_for: EngineFor, model: PreTrainedModel, prompt: Tokens
) -> None:
    producer, reader = engine_for(model), engine_for(model)
    first = producer.generate(prompt, 13)
    producer.flush()
    # 100 + 13 tokens, of which the last has no KV: 7 blocks of 16 are 112.
    turn = np.concatenate([prompt, np.array(first.tokens, np.int32), prompt[:10]])
    assert reader.generate(turn, 1).report.local_tokens == 112
    producer.generate(prompt, 12)
    assert producer.generate(turn, 1).report.own_tokens == 111


def test_an_own_hit_is_continued_without_asking_the_tier(
    engine_for: EngineFor, tier: MemoryTier, model: PreTrainedModel, prompt: Tokens
) -> None:
    engine = engine_for(model)
    first = engine.generate(prompt, 4)
    engine.flush()
    lookups = tier.lookups
    again = engine.generate(prompt, 4)
    assert again.report.own_tokens == PROMPT_TOKENS - 1
    assert again.tokens == first.tokens
    engine.flush()
    assert tier.lookups == lookups + 2  # by the two saves


def test_forgetting_leaves_only_the_tier(
    engine_for: EngineFor, tier: MemoryTier, model: PreTrainedModel, prompt: Tokens
) -> None:
    engine = engine_for(model)
    tier.source = "remote"
    engine.generate(prompt, 2)
    engine.forget()
    report = engine.generate(prompt, 2).report
    assert (report.own_tokens, report.local_tokens, report.remote_tokens) == (0, 0, 96)
    engine.forget()
    tier.blocks.clear()
    assert engine.generate(prompt, 2).report.prefilled_tokens == PROMPT_TOKENS


def test_a_failed_transfer_is_recomputed(
    engine_for: EngineFor, tier: MemoryTier, model: PreTrainedModel, prompt: Tokens
) -> None:
    producer, reader = engine_for(model), engine_for(model)
    cold = producer.generate(prompt, 8)
    producer.flush()
    reader.generate(prompt[:40], 1)
    reader.flush()
    tier.get_error = OSError("reset by peer")
    completion = reader.generate(prompt, 8)
    assert completion.report.own_tokens == 32
    assert completion.report.prefilled_tokens == PROMPT_TOKENS - 32
    assert_same_greedy(completion.tokens, cold.tokens, cold.gaps)


def test_memory_that_a_stuck_transfer_may_write_is_never_used_again(
    engine_for: EngineFor, tier: MemoryTier, prompt: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(torch.float32)
    engine, reader = engine_for(model), engine_for(model)
    expected = engine.generate(prompt, 4)
    engine.forget()
    tier.blocks.clear()

    def stuck(self: Connector[FakePlan], request: Request) -> Abandoned:
        for layer in range(3):
            request.staging.host_rows.rows(layer, 0, CAPACITY)[:] = 0xFF
        return Abandoned()

    monkeypatch.setattr(Connector, "match_now", stuck)
    again = engine.generate(prompt, 4)
    assert again.report.prefilled_tokens == PROMPT_TOKENS
    assert again.tokens == expected.tokens
    engine.flush()
    monkeypatch.undo()
    warm = reader.generate(prompt, 4)
    assert warm.report.local_tokens == 96
    assert warm.tokens == expected.tokens


def test_a_stream_gives_tokens_before_its_report(
    engine_for: EngineFor, model: PreTrainedModel, prompt: Tokens
) -> None:
    engine = engine_for(model, None)
    answer = engine.stream(prompt, 3)
    first = next(answer)
    with pytest.raises(UsageError, match="no report before"):
        _ = answer.report
    with pytest.raises(UsageError, match="answering another request"):
        next(engine.stream(prompt, 3))
    rest = list(answer)
    assert answer.report.generated_tokens == len([first, *rest]) == 3


def test_an_answer_closed_early_leaves_a_usable_engine(
    engine_for: EngineFor, model: PreTrainedModel, prompt: Tokens
) -> None:
    engine = engine_for(model, None)
    expected = engine.generate(prompt, 6)
    engine.forget()
    answer = engine.stream(prompt, 6)
    next(answer)
    next(answer)
    answer.close()
    again = engine.generate(prompt, 6)
    assert again.report.own_tokens == PROMPT_TOKENS - 1
    assert again.tokens == expected.tokens


def test_a_stop_token_is_given_and_ends_the_answer(
    engine_for: EngineFor, model: PreTrainedModel, prompt: Tokens
) -> None:
    engine = engine_for(model, None)
    tokens = engine.generate(prompt, 6).tokens
    stop = tokens[2]
    stopped = engine.generate(prompt, 6, stop_tokens=[stop]).tokens
    assert stopped == tokens[: tokens.index(stop) + 1]


def test_a_seed_repeats_and_another_differs(
    engine_for: EngineFor, model: PreTrainedModel, prompt: Tokens
) -> None:
    engine = engine_for(model, None)
    runs = [
        engine.generate(prompt, 12, Sampling(temperature=50.0, seed=seed)).tokens
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_top_k_and_top_p_leave_out_the_unlikely() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 2.5, -1.0])
    top_k = Sampler(Sampling(temperature=5.0, top_k=2))
    assert {top_k.choose(logits).token for _ in range(60)} == {1, 3}
    top_p = Sampler(Sampling(temperature=1.0, top_p=0.3))
    assert {top_p.choose(logits).token for _ in range(20)} == {1}
    assert Sampler(Sampling()).choose(logits).gap == pytest.approx(0.5)


def test_a_model_loads_from_a_local_path(tmp_path: Path, engine_for: EngineFor) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m", "bfloat16")
    assert numerics_of(model) == "torch-sdpa-cpu"
    assert engine_for(model, None).generate([1, 2, 3], 2).report.prompt_tokens == 3


@pytest.mark.parametrize(
    ("prompt_tokens", "new_tokens", "sentence"),
    [
        ([], 1, "at least one prompt token"),
        ([1], 0, "at least one prompt token"),
        ([1] * 150, 60, "do not fit the engine's 192"),
        ([[0.5]], 1, "prompt embeddings"),
        ([2**31], 1, "token ids must be"),
    ],
)
def test_refuses_in_one_sentence(
    engine_for: EngineFor, prompt_tokens: Any, new_tokens: int, sentence: str
) -> None:
    engine = engine_for(tiny_model(torch.float32), None)
    with pytest.raises(UsageError, match=sentence):
        engine.stream(prompt_tokens, new_tokens)


def test_refuses_a_model_whose_window_slides(engine_for: EngineFor) -> None:
    model = tiny_model(torch.float32)
    model.config.sliding_window = 32
    with pytest.raises(UsageError, match="sliding window"):
        engine_for(model, None)


def test_refuses_a_missing_path_and_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model at"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="int3"):
        load_model(tmp_path, "int3")
