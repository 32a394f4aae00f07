"""A trained model as EleutherAI's lm-eval asks for it: `pip install 'flashtrain[lm-eval]'`.

scripts/evaluate.py RUN --tasks arc_easy,hellaswag asks a checkpoint, and a run asks itself at
intervals: trainer.benchmark.tasks=[arc_easy]. Tasks bring their own data sets, which lm-eval
fetches from Hugging Face; a task file of one's own names local ones.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from flashtrain.examinee import Examinee
from flashtrain.scoring import windows

NEW_TOKENS = 256  # of an answer where the task does not say


class FlashtrainLM(TemplateLM):  # type: ignore[misc]  # untyped where not installed
    """Scores and answers; lm-eval's own metrics do the rest."""

    tokenizer_name = "flashtrain"

    def __init__(self, examinee: Examinee) -> None:
        super().__init__()
        self.examinee, self.max_length = examinee, examinee.max_length

    @property
    def eot_token_id(self) -> int:
        return self.examinee.tokenizer.end_of_text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.examinee.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = self.examinee.score(pairs)
        return [(score.log_probability, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], **kwargs: Any) -> list[float]:
        texts = [[self.eot_token_id, *self.tok_encode(request.args[0])] for request in requests]
        parts = [list(windows(ids, self.max_length, self.max_length)) for ids in texts]
        scores = iter(self.examinee.score([pair for part in parts for pair in part]))
        return [sum(next(scores).log_probability for _ in part) for part in parts]

    def generate_until(self, requests: list[Instance], **kwargs: Any) -> list[str]:
        alike: dict[str, list[int]] = {}  # settings -> requests
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers: dict[int, str] = {}
        for text, numbers in alike.items():
            contexts = [requests[number].args[0] for number in numbers]
            answers |= zip(numbers, self._answers(contexts, json.loads(text)), strict=True)
        return [answers[number] for number in range(len(requests))]

    def _answers(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else [string for string in until if string]
        new = int(settings.get("max_gen_toks", NEW_TOKENS))
        room = max(1, self.max_length - new)
        prompts = [self.tok_encode(text)[-room:] or [self.eot_token_id] for text in contexts]
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        return self.examinee.answer(prompts, new, temperature, until)


def evaluate(
    examinee: Examinee,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    folder: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """{task: {metric: value}} as lm-eval reports it; inside of `examinee.examine`.

    shots: examples before each question; None leaves it to the task. limit: questions of each task.
    folder: task files of one's own.
    """
    results: dict[str, Any] = simple_evaluate(
        model=FlashtrainLM(examinee),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=_manager(folder),
        bootstrap_iters=0,
    )
    found: dict[str, dict[str, Any]] = results["results"]
    return found


def unknown_tasks(tasks: Sequence[str], folder: Path | None = None) -> list[str]:
    """Those that neither lm-eval nor the folder has."""
    manager = _manager(folder)
    return [task for task in tasks if not manager.match_tasks([task])]


@cache
def _manager(folder: Path | None) -> Any:
    """Reads the heads of thousands of task files, once."""
    return TaskManager(include_path=None if folder is None else str(folder))
