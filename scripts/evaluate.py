"""How good a trained model is: perplexity on any text, and the tasks of EleutherAI's lm-eval.

    python scripts/evaluate.py runs/NAME --text novel.txt --text notes.md
    python scripts/evaluate.py runs/NAME --text novel.txt --stride 256     # more context, slower
    python scripts/evaluate.py runs/NAME --text novel.txt --follow         # while the run trains
    python scripts/evaluate.py runs/NAME --tasks arc_easy,hellaswag --limit 200
    python scripts/evaluate.py runs/NAME --tasks my_task --task-folder tasks/

RUN is a run folder (its newest valid checkpoint), a checkpoint folder inside one, or what
import_hf.py made. One process, on the GPU where there is one. Every text begins after an
end-of-text token and is read in windows of the length that the model was trained on; --stride S
moves them by S tokens, so that every token but the first ones has at least that length - S before
it. Bits per byte compare models with different tokenizers. Results are appended to
RUN/evaluations.jsonl. --tasks needs the package: pip install 'flashtrain[lm-eval]'.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flashtrain.checkpoint import CheckpointError, locate
from flashtrain.config import ConfigError
from flashtrain.launch import ENDED, REFUSED, STOPPED

RECORD = "evaluations.jsonl"
LOOK_AGAIN = 15.0  # seconds, with --follow


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder or a checkpoint")
    parser.add_argument(
        "--text", type=Path, action="append", default=[], metavar="FILE", help="UTF-8; repeatable"
    )
    parser.add_argument("--stride", type=int, help="tokens (default: the model's length)")
    parser.add_argument("--tasks", default="", help="of lm-eval, with commas between them")
    parser.add_argument("--task-folder", type=Path, help="task files of your own")
    parser.add_argument("--shots", type=int, help="examples before each question")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time (8)")
    parser.add_argument(
        "--follow", action="store_true", help="every new checkpoint until the run ends"
    )
    options = parser.parse_args()
    try:
        check(options)
        return follow(options) if options.follow else evaluate(options)
    except (ValueError, OSError, CheckpointError) as error:  # a ConfigError among them
        print(f"evaluate: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return STOPPED


def check(options: argparse.Namespace) -> None:
    """Refuse before a model is read."""
    if not options.text and not options.tasks:
        raise ConfigError("nothing to evaluate on: name --text FILE or --tasks NAME,NAME")
    for path in options.text:
        if not path.is_file():
            raise ConfigError(f"--text {path} is not a file")
    if options.tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs the package lm-eval, which is not installed: "
            "pip install 'flashtrain[lm-eval]'"
        )


def follow(options: argparse.Namespace) -> int:
    """Evaluate the newest checkpoint, wait for the next one; end with the run."""
    run, seen = options.run, None
    while True:
        ended = (run / ENDED).is_file()
        steps = sorted((run / "checkpoints").glob("step-*/manifest.json"))
        newest = steps[-1].parent if steps else None
        if newest is not None and newest != seen:
            seen = newest
            try:
                options.run = newest
                evaluate(options)
            except (OSError, CheckpointError) as error:  # deleted meanwhile: a newer one is there
                print(f"evaluate: {error}", file=sys.stderr)
        elif ended:
            return 0
        else:
            time.sleep(LOOK_AGAIN)


def evaluate(options: argparse.Namespace) -> int:
    path = locate(options.run)
    rows = [*on_texts(options, path), *on_tasks(options, path)]
    step = int(path.name.partition("-")[2] or 0)
    record = path.parent.parent / RECORD
    with record.open("a") as file:
        for row in rows:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **row}) + "\n")
    print(f"{path}  (recorded in {record})")
    return 0


def on_texts(options: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    if not options.text:
        return []
    import torch

    from flashtrain.scoring import Scorer, perplexity
    from flashtrain.trained import open_trained

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = open_trained(path, device)
    length = trained.config.data.sequence_length
    scorer = Scorer(trained.model, length, options.batch_size)
    rows = []
    print(f"{'text':<32}{'tokens':>10}{'bytes':>11}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}")
    for text in options.text:
        found = perplexity(
            scorer, trained.tokenizer, text.read_text(errors="strict"), options.stride or length
        )
        print(
            f"{text.name[:31]:<32}{found.tokens:>10,}{found.bytes:>11,}{found.loss:>9.4f}"
            f"{found.perplexity:>12.2f}{found.bits_per_byte:>11.4f}"
        )
        rows.append(
            {
                "text": str(text), "tokens": found.tokens, "loss": found.loss,
                "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte,
            }
        )  # fmt: skip
    return rows


def on_tasks(options: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    if not options.tasks:
        return []
    from flashtrain.integrations.lm_eval import evaluate as evaluate_tasks

    found = evaluate_tasks(
        path,
        options.tasks.split(","),
        shots=options.shots,
        limit=options.limit,
        batch_size=options.batch_size,
        task_folder=options.task_folder,
    )
    rows = []
    for task, metrics in found.items():
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        shown = "  ".join(f"{key.partition(',')[0]} {value:.4g}" for key, value in numbers.items())
        print(f"{task:<32}{shown}")
        rows.append({"task": task, **numbers})
    return rows


if __name__ == "__main__":
    sys.exit(main())
