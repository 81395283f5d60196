"""The demo's story: what is run in which order, and what is measured.

    worker A, own node 1      reads the contract with one question (cold) and offers its KV
    worker B, own node 2      answers the second question with the contract from node 1: warm;
                              used twice now, the contract is written to node 1's disk
    A and B in turns          once the disks rest: A from its own cache, the own hit, and B from
                              the tier, its cache emptied and the question deleted, many times, each
                              soon behind an answer to the first question; one token is enough
    worker C, no tier         answers it without any cache: cold, the reference
    node 1 is killed          B, its cache emptied, answers again: from scratch, and the same
    the machine "restarts"    everything is killed and the shared memory discarded; the tier is
                              started again, and a new worker D on node 2 answers: warm from NVMe

Every figure is of this very run. Does not cover: how it is shown (``worker.demo.report``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.demo.progress import Show
from worker.demo.prompt import Prompt
from worker.demo.tier import DemoTier
from worker.demo.worker_process import WorkerAnswer, WorkerProcess

ROUNDS = 21
"""Odd, so that a median is one of the samples. So many, as a machine's speed comes and goes."""
QUIET_S = 0.5
"""Without a write for so long, a disk is at rest."""
BETWEEN_S = 0.02
"""From the end of an answer to the next question. Before that, threads of PyTorch's that have
nothing to do any more still spin on every processor, which is a matter of the engine's alone."""
DISK_PATIENCE_S = 120.0
FOUND_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Story:
    """The answers to the second question, by how they came about, and to the first.

    ``first_warm`` is B's first, beside which the contract is written to a disk. The own hits and
    the warm answers behind it are cut short after one token, whose time is what they are for.
    """

    prompt_tokens: int
    first: WorkerAnswer
    first_warm: WorkerAnswer
    own_hits: tuple[WorkerAnswer, ...]
    warms: tuple[WorkerAnswer, ...]
    cold: WorkerAnswer
    after_kill: WorkerAnswer
    after_restart: WorkerAnswer
    worker_pids: dict[str, int]
    storage_nodes: tuple[str, ...]

    @property
    def own_hit(self) -> WorkerAnswer:
        """The own hit with the median TTFT."""
        return median_of(self.own_hits)

    @property
    def warm(self) -> WorkerAnswer:
        """The warm answer with the median TTFT."""
        return median_of(self.warms)

    @property
    def outputs_identical(self) -> bool:
        """Whether every warm answer has the cold one's tokens, the short ones their one."""
        return self.is_like_cold(self.first_warm) and all(map(self.begins_like_cold, self.warms))

    def is_like_cold(self, answer: WorkerAnswer) -> bool:
        """Whether a whole answer to the second question has the cold one's tokens."""
        return answer.tokens == self.cold.tokens

    def begins_like_cold(self, answer: WorkerAnswer) -> bool:
        """Whether an answer that was cut short has the cold one's first token, and no other."""
        return answer.tokens == self.cold.tokens[:1]


def tell(
    tier: DemoTier,
    model: Path,
    prompts: tuple[Prompt, Prompt],
    new_tokens: int,
    work_folder: Path,
    show: Show,
) -> Story:
    """Run the story on a tier of at least two nodes."""
    first, second = prompts
    show.step("starting three workers, each with the model")
    with (
        WorkerProcess("A", model, work_folder, tier.door(0)) as reader,
        WorkerProcess("B", model, work_folder, tier.door(1)) as asker,
        WorkerProcess("C", model, work_folder, None) as stranger,
    ):
        for worker in (reader, asker, stranger):
            worker.ready()
        show.step("worker A reads the contract (cold) and answers the first question")
        answer_first = reader.ask(first, new_tokens)
        reader.flush()
        # One token more, as the last of a prompt is never looked for.
        contract = Prompt(second.tokens[: second.boundary + 1], second.boundary)
        show.watch(
            "node 1 announces the contract",
            lambda: asker.look_up(contract).tokens, contract.boundary, FOUND_PATIENCE_S,
        )  # fmt: skip
        show.step("worker B, on the other node, answers the second question (warm)")
        first_warm = asker.ask(second, new_tokens)
        wanted = asker.look_up(contract).cells
        show.watch(
            "node 1 writes the contract to its disk, now that it was used twice",
            lambda: tier.cells_on_disk(0), wanted, DISK_PATIENCE_S,
        )  # fmt: skip
        own_hits, warms = _in_turns(tier, reader, asker, prompts, show)
        show.step("worker C answers it without the tier (cold)")
        cold = stranger.ask(second, new_tokens)
        show.step("node 1 is killed; worker B forgets everything and answers again")
        asker.forget()
        tier.kill_node(0)
        after_kill = asker.ask(second, new_tokens)
        asker.flush()
        pids = {worker.name: worker.pid for worker in (reader, asker, stranger)}
    _restart(tier, show)
    with WorkerProcess("D", model, work_folder, tier.door(1)) as newcomer:
        newcomer.ready()
        show.watch(
            "the nodes announce what is on their disks",
            lambda: newcomer.look_up(second).tokens, second.boundary, FOUND_PATIENCE_S,
        )  # fmt: skip
        show.step("worker D, which has seen nothing, answers the second question (warm from NVMe)")
        after_restart = newcomer.ask(second, new_tokens)
        pids[newcomer.name] = newcomer.pid
    return Story(
        prompt_tokens=len(second.tokens),
        first=answer_first,
        first_warm=first_warm,
        own_hits=own_hits,
        warms=warms,
        cold=cold,
        after_kill=after_kill,
        after_restart=after_restart,
        worker_pids=pids,
        storage_nodes=tier.node_ids,
    )


def median_of(answers: Sequence[WorkerAnswer]) -> WorkerAnswer:
    """The one with the median TTFT; of an even number the lower one."""
    return sorted(answers, key=lambda answer: answer.report.ttft_s)[(len(answers) - 1) // 2]


def _in_turns(
    tier: DemoTier,
    reader: WorkerProcess,
    asker: WorkerProcess,
    prompts: tuple[Prompt, Prompt],
    show: Show,
) -> tuple[tuple[WorkerAnswer, ...], tuple[WorkerAnswer, ...]]:
    """Own hits and warm answers to the second question, while the disks rest.

    Each comes ``BETWEEN_S`` behind an answer to the first question, as under traffic: a processor
    that has been idle for longer takes its time.
    """
    first, second = prompts
    own_hits, warms = [], []
    words = f"A answers from its own cache (own hit), B from the tier (warm): {ROUNDS} times each"
    for _ in show.rounds(words, ROUNDS):
        _rest_disks(tier, show)
        # Else it would still have the whole second question, and nothing to run.
        reader.ask(first, new_tokens=1)
        reader.flush()
        show.pause(BETWEEN_S)
        own_hits.append(reader.ask(second, new_tokens=1))
        reader.flush()
        asker.delete_question(second)  # else the tier would have it too by now
        _rest_disks(tier, show)
        asker.forget()
        asker.ask(first, new_tokens=1)
        asker.forget()
        show.pause(BETWEEN_S)
        warms.append(asker.ask(second, new_tokens=1))
        asker.flush()
    return tuple(own_hits), tuple(warms)


def _rest_disks(tier: DemoTier, show: Show) -> None:
    """What is measured next has the disks, and the processors, to itself."""
    show.settle("the nodes' disks", tier.stored_cells, QUIET_S, DISK_PATIENCE_S)


def _restart(tier: DemoTier, show: Show) -> None:
    """What a machine's restart comes to: only the disks remain."""
    show.step("every process of the tier is killed, and its shared memory discarded")
    killed = tier.lose_power()
    show.step(f"{killed} processes are dead; the tier is started again")
    tier.start_again()
