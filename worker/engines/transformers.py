"""The transformers engine: one causal LM from a local path, one request at a time.

    tokens   0 .............. cached .............. P ........ P + generated - 1
             [ own, or from the tier ][  prefilled  ][ decoded one by one ]  last: chosen, not run

A request goes on with what its engine still holds from the request before (an *own* hit, continued
in place, never copied), and what the tier has behind that. Only the rest is run, in one go, and
only the last position's logits are computed. KV that was really computed is offered to the tier
after the first token, and again with the generated tokens after the last. A token that was chosen
but not run has no KV, so it is never offered.

Does not cover: batches, tokenizers and chat templates; keys and transfers (``worker.connector``).
"""

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvstore.clock import Clock
from kvstore.errors import UsageError
from kvstore.key import Tokens, as_tokens
from worker.connector import Abandoned, Connector, Request
from worker.engines.answer import Answer, Completion, Report
from worker.engines.resident import Resident
from worker.engines.sampling import GREEDY, Choice, Sampler, Sampling
from worker.engines.tail import short_tail
from worker.geometry import Attention, Layout, layout_of

CAPACITY_TOKENS_DEFAULT = 8192
WARM_UP_TOKENS = 8
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Job:
    """One request as its engine takes it."""

    prompt: Tokens
    max_new_tokens: int
    sampling: Sampling
    boundaries: tuple[int, ...]
    stop_tokens: frozenset[int]
    arrived_s: float


@dataclass(frozen=True, slots=True)
class _Cached:
    """What of a prompt is not run, by source."""

    own: int
    local: int
    remote: int
    nvme: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.own + self.local + self.remote + self.nvme


def load_model(path: Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """Load a causal LM from a local folder, with SDPA attention and without dropout."""
    if not (path / "config.json").is_file():
        raise UsageError(f"no model at {path}: give a folder with config.json and tensor files")
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=DTYPES[dtype], attn_implementation="sdpa", local_files_only=True
    )
    model: PreTrainedModel = loaded.to(device).eval()
    return model


def layout_for(model: PreTrainedModel) -> Layout:
    """The layout of the KV that ``model`` really hands its cache; runs one token to see it.

    The configuration doesn't tell all: latent attention, for one, is cached compressed by some
    versions of transformers and per head by others.
    """
    configured = layout_of(model.config, str(model.dtype).removeprefix("torch."))
    cache: Any = DynamicCache()
    with torch.inference_mode():
        one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        model(input_ids=one, past_key_values=cache, use_cache=True, logits_to_keep=1)
    seen = {
        (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers
    }
    if len(seen) != 1 or len(cache.layers) != configured.layers:
        raise UsageError(
            f"layers of {model.config.model_type} differ in KV shape: not supported yet"
        )
    kv_heads, k_width, v_width = seen.pop()
    attention = configured.attention if kv_heads == configured.kv_heads else Attention.MHA
    return replace(
        configured, attention=attention, kv_heads=kv_heads, k_width=k_width, v_width=v_width
    )


def numerics_of(model: PreTrainedModel) -> str:
    """The family of kernels that computes the KV (see ``worker.geometry.kv_form_of``)."""
    return f"torch-{model.config._attn_implementation}-{model.device.type}"


class TransformersEngine:
    """Answers prompts with one model, in its own KV cache, with a tier or without."""

    def __init__(
        self,
        model: PreTrainedModel,
        clock: Clock,
        connector: Connector[Any] | None = None,
        capacity_tokens: int = CAPACITY_TOKENS_DEFAULT,
    ) -> None:
        self._model = model
        self._clock = clock
        self._connector = connector
        positions = getattr(model.config, "max_position_embeddings", None) or capacity_tokens
        capacity = min(capacity_tokens, positions)
        self._resident = Resident(layout_for(model), capacity, model.dtype, model.device)
        self._ran_tokens = 0
        self._requests = 0
        self._answering = False
        self._counter = model.get_input_embeddings().register_forward_hook(self._count)
        self._prefill_logits = self._warm_up()

    @property
    def prefill_logits(self) -> torch.Tensor:
        """The logits that the last answer's first token was chosen from."""
        return self._prefill_logits

    def stream(
        self,
        prompt: Sequence[int] | npt.NDArray[np.integer],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        boundaries: Sequence[int] = (),
        stop_tokens: Collection[int] = (),
    ) -> Answer:
        """Start an answer, which gives each token as soon as it is chosen.

        ``boundaries`` are the token counts up to which the prompt's KV shall be found again even
        if a block doesn't end there, such as the end of a document. A stop token is given, then
        ends the answer.
        """
        arrived_s = self._clock.monotonic_s()
        tokens = _token_ids(prompt)
        wanted = len(tokens) + max_new_tokens - 1
        if len(tokens) == 0 or max_new_tokens < 1:
            raise UsageError("a request needs at least one prompt token and one new token")
        if wanted > self._resident.capacity:
            raise UsageError(
                f"{len(tokens)} prompt tokens and {max_new_tokens} new ones do not fit the "
                f"engine's {self._resident.capacity} tokens of KV"
            )
        stops = frozenset(stop_tokens)
        job = _Job(tokens, max_new_tokens, sampling, tuple(boundaries), stops, arrived_s)
        return Answer(self._run(job))

    def generate(
        self,
        prompt: Sequence[int] | npt.NDArray[np.integer],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        boundaries: Sequence[int] = (),
        stop_tokens: Collection[int] = (),
    ) -> Completion:
        """The whole answer at once (see ``stream``)."""
        answer = self.stream(prompt, max_new_tokens, sampling, boundaries, stop_tokens)
        choices = list(answer)
        tokens = tuple(choice.token for choice in choices)
        return Completion(tokens, tuple(choice.gap for choice in choices), answer.report)

    def forget(self) -> None:
        """Drop what the engine holds itself, so that only the tier can make a prompt warm."""
        self.flush()
        self._resident.hold(np.empty(0, np.int32))

    def flush(self) -> None:
        """Wait until the tier has taken, or refused, everything that it was offered."""
        if self._connector is not None:
            self._connector.settle()

    def close(self) -> None:
        """Flush, and leave the model as it was. The connector stays its owner's to close."""
        self.flush()
        self._counter.remove()

    def _run(self, job: _Job) -> Generator[Choice, None, Report]:
        if self._answering:
            raise UsageError("the engine is answering another request: finish or close it first")
        self._answering = True
        try:
            return (yield from self._answer(job))
        finally:
            self._answering = False

    def _answer(self, job: _Job) -> Generator[Choice, None, Report]:
        self.flush()
        ran_before = self._ran_tokens
        sampler = Sampler(job.sampling)
        request = self._request(job)
        cached = self._reuse(request)
        self._prefill_logits = self._forward(job.prompt[self._resident.length :])
        choice = sampler.choose(self._prefill_logits)
        ttft_s = self._clock.monotonic_s() - job.arrived_s
        prefilled = self._ran_tokens - ran_before
        self._offer(request)
        generated = 1
        yield choice
        while generated < job.max_new_tokens and choice.token not in job.stop_tokens:
            choice = sampler.choose(self._forward(np.array([choice.token], np.int32)))
            generated += 1
            yield choice
        if generated > 1:
            self._offer(request)
        return Report(
            prompt_tokens=len(job.prompt),
            own_tokens=cached.own,
            local_tokens=cached.local,
            remote_tokens=cached.remote,
            nvme_tokens=cached.nvme,
            prefilled_tokens=prefilled,
            generated_tokens=generated,
            ttft_s=ttft_s,
            total_s=self._clock.monotonic_s() - job.arrived_s,
        )

    def _request(self, job: _Job) -> Request:
        self._requests += 1
        return Request(
            id=str(self._requests),
            tokens=job.prompt,
            staging=self._resident.staging,
            boundaries=job.boundaries,
            resident=self._resident.shared(job.prompt),
        )

    def _reuse(self, request: Request) -> _Cached:
        """Make the cache hold the longest prefix of the prompt that needn't be run."""
        own = request.resident
        cached = _Cached(own, 0, 0, 0)
        if self._connector is not None:
            answer = self._connector.match_now(request)
            if isinstance(answer, Abandoned):
                self._resident.renew()
                cached = _Cached(0, 0, 0, 0)
            else:
                self._connector.load(request, answer)
                cached = _Cached(answer.kept, answer.local, answer.remote, answer.nvme)
        self._resident.hold(request.tokens[: cached.tokens])
        return cached

    def _offer(self, request: Request) -> None:
        if self._connector is not None:
            # Not the staging that the request was matched with: its memory may have been given up.
            offered = replace(request, staging=self._resident.staging)
            self._connector.save(offered, self._resident.tokens)

    @torch.inference_mode()
    def _forward(self, tokens: Tokens) -> torch.Tensor:
        """Run ``tokens`` behind what the cache holds; gives the last position's logits."""
        before = self._resident.length
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self._model.device)[None]
        try:
            with short_tail(self._model, before, len(tokens)):
                output = self._model(
                    input_ids=ids,
                    past_key_values=self._resident.cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        except BaseException:
            # Some layers have written the new tokens and some have not: none counts.
            self._resident.cache.truncate(before)
            raise
        self._resident.ran(tokens)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _warm_up(self) -> torch.Tensor:
        """Run both shapes of work once, which also proves that the model fits the layout."""
        self._forward(np.zeros(min(WARM_UP_TOKENS, self._resident.capacity - 1), np.int32))
        logits = self._forward(np.zeros(1, np.int32))
        self._resident.hold(np.empty(0, np.int32))
        return logits

    def _count(self, module: torch.nn.Module, inputs: tuple[torch.Tensor], output: Any) -> None:
        """A hook on the embedding, where every token that is run comes by."""
        self._ran_tokens += inputs[0].numel()


def _token_ids(prompt: Sequence[int] | npt.NDArray[np.integer]) -> Tokens:
    array = np.asarray(prompt)
    if array.dtype.kind == "f" and array.size:
        raise UsageError("prompt embeddings can't be cached: give token ids")
    return as_tokens(array)
