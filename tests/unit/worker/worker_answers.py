"""What a demo's worker answers: where its prompt came from, and how long that took."""

from worker.demo.worker_process import WorkerAnswer
from worker.engines.answer import Report

TOKENS = (5, 6, 7)


def answered(
    ttft_s: float, *, own: int = 0, remote: int = 0, nvme: int = 0, tokens: tuple[int, ...] = TOKENS
) -> WorkerAnswer:
    cached = own + remote + nvme
    report = Report(
        prompt_tokens=100,
        own_tokens=own,
        local_tokens=0,
        remote_tokens=remote,
        nvme_tokens=nvme,
        prefilled_tokens=100 - cached,
        generated_tokens=len(tokens),
        ttft_s=ttft_s,
        total_s=2 * ttft_s,
    )
    return WorkerAnswer(tokens, report)
