"""A trained model as EleutherAI's lm-eval asks for it: `pip install 'flashtrain[lm-eval]'`.

    from flashtrain.integrations.lm_eval import evaluate
    evaluate(Path("runs/NAME"), ["arc_easy", "hellaswag"])

scripts/evaluate.py RUN --tasks arc_easy,hellaswag does the same. Tasks bring their own data sets,
which lm-eval fetches from Hugging Face; a task file of one's own names local ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from flashtrain.data.unfinished import cut, stops_at
from flashtrain.engine.decoder import Decoder
from flashtrain.model.generate import complete
from flashtrain.model.sampling import Sampling
from flashtrain.scoring import Scorer, windows
from flashtrain.trained import Trained, open_trained

NEW_TOKENS = 256  # of an answer where the task does not say


class FlashtrainLM(TemplateLM):  # type: ignore[misc]  # untyped where not installed
    """Scores and generates with one process; lm-eval's own metrics do the rest."""

    def __init__(self, trained: Trained, device: torch.device, batch_size: int = 8) -> None:
        super().__init__()
        self._device = device
        self.trained, self.batch_size = trained, batch_size
        self.max_length = trained.config.data.sequence_length
        self.scorer = Scorer(trained.model, self.max_length, batch_size)

    @property
    def eot_token_id(self) -> int:
        return self.trained.tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        return str(self.trained.path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.trained.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = self.scorer.score(pairs)
        return [(score.log_probability, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], **kwargs: Any) -> list[float]:
        totals = []
        for request in requests:
            ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
            pairs = list(windows(ids, self.max_length, self.max_length))
            totals.append(sum(score.log_probability for score in self.scorer.score(pairs)))
        return totals

    def generate_until(self, requests: list[Instance], **kwargs: Any) -> list[str]:
        return [self._answer(*request.args) for request in requests]

    def _answer(self, context: str, settings: dict[str, Any]) -> str:
        tokenizer = self.trained.tokenizer
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else [string for string in until if string]
        new = int(settings.get("max_gen_toks", NEW_TOKENS))
        room = max(1, self.max_length - new)
        prompt = self.tok_encode(context)[-room:] or [self.eot_token_id]
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        (drawn,) = complete(
            Decoder(self.trained.model),
            [prompt],
            new,
            max_length=self.max_length,
            sampling=Sampling(temperature=temperature),
            n_ids=tokenizer.size,
            end=self.eot_token_id,
            stop=stops_at(tokenizer, until),
        )
        ids = drawn[:-1] if drawn and drawn[-1] == self.eot_token_id else drawn
        return cut(tokenizer.decode(ids), until)


def evaluate(
    run: Path,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    task_folder: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """{task: {metric: value}} of a run's newest checkpoint, as lm-eval reports it.

    shots: examples before each question; None leaves it to the task. limit: questions of each task.
    task_folder: task files of one's own.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = FlashtrainLM(open_trained(run, device), device, batch_size)
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    results: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
    )
    found: dict[str, dict[str, Any]] = results["results"]
    return found
