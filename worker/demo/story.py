"""The demo's story: what is run in which order, and what is measured.

    worker A, own node 1      reads the contract with one question (cold), offers its KV,
                              then answers the second question from its own cache: the own hit
    worker B, own node 2      answers the second question with the contract from node 1: warm
    worker C, no tier         answers it without any cache: cold, the reference
    node 1 is killed          B, its cache emptied, answers again: from scratch, and the same

Every figure is of this very run. Does not cover: how it is shown (``worker.demo.report``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from worker.demo.prompt import Prompt
from worker.demo.tier import DemoTier
from worker.demo.worker_process import WorkerAnswer, WorkerProcess

Step = Callable[[str], None]
"""Called with a few words as each long step begins."""


@dataclass(frozen=True, slots=True)
class Story:
    """The answers to the second question, by how they came about, and to the first."""

    prompt_tokens: int
    first: WorkerAnswer
    own_hit: WorkerAnswer
    warm: WorkerAnswer
    cold: WorkerAnswer
    after_kill: WorkerAnswer
    worker_pids: dict[str, int]
    storage_nodes: tuple[str, ...]

    @property
    def outputs_identical(self) -> bool:
        """Whether the warm answer has the cold one's tokens."""
        return self.warm.tokens == self.cold.tokens


def tell(
    tier: DemoTier,
    model: Path,
    prompts: tuple[Prompt, Prompt],
    new_tokens: int,
    work_folder: Path,
    step: Step,
) -> Story:
    """Run the story on a tier of at least two nodes."""
    first, second = prompts
    step("starting three workers, each with the model")
    with (
        WorkerProcess("A", model, work_folder, tier.door(0)) as reader,
        WorkerProcess("B", model, work_folder, tier.door(1)) as asker,
        WorkerProcess("C", model, work_folder, None) as stranger,
    ):
        for worker in (reader, asker, stranger):
            worker.ready()
        step("worker A reads the contract (cold) and answers the first question")
        answer_first = reader.ask(first.tokens.tolist(), first.boundary, new_tokens)
        reader.flush()
        step("worker B, on the other node, answers the second question (warm)")
        tokens = second.tokens.tolist()
        warm = asker.ask(tokens, second.boundary, new_tokens)
        step("worker A answers it too, from its own cache (own hit)")
        own_hit = reader.ask(tokens, second.boundary, new_tokens)
        reader.flush()
        step("worker C answers it without the tier (cold)")
        cold = stranger.ask(tokens, second.boundary, new_tokens)
        step("node 1 is killed; worker B forgets everything and answers again")
        asker.forget()
        tier.kill_node(0)
        after_kill = asker.ask(tokens, second.boundary, new_tokens)
        pids = {worker.name: worker.pid for worker in (reader, asker, stranger)}
    return Story(len(tokens), answer_first, own_hit, warm, cold, after_kill, pids, tier.node_ids)
