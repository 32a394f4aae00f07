"""How good a trained model is: perplexity on any text, and the tasks of EleutherAI's lm-eval.

    python scripts/evaluate.py runs/NAME --text novel.txt --text notes.md
    python scripts/evaluate.py runs/NAME --text novel.txt --stride 256     # more context, slower
    python scripts/evaluate.py runs/NAME --text novel.txt --follow         # while the run trains
    python scripts/evaluate.py runs/NAME --tasks arc_easy,hellaswag --limit 200
    python scripts/evaluate.py runs/NAME --tasks my_task --task-folder tasks/
    torchrun --nproc-per-node 2 scripts/evaluate.py runs/NAME --text novel.txt   # tensor parallel

RUN is a run folder (its newest valid checkpoint), a checkpoint folder inside one, or what
import_hf.py made. On the GPU where there is one. Every text begins after an end-of-text token and
is read in windows of the length that the model was trained on; --stride S moves them by S tokens,
so that every token but the first ones has at least that length - S before it. Bits per byte compare
models with different tokenizers. Results are appended to evaluations.jsonl of the run folder, which
report.py shows. --tasks needs the package: pip install 'flashtrain[lm-eval]'. A run can measure the
same at intervals by itself: trainer.benchmark.texts=[novel.txt] trainer.benchmark.tasks=[arc_easy].
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from flashtrain.benchmark import Row, check_benchmark, on_tasks, on_texts
from flashtrain.checkpoint import CheckpointError
from flashtrain.config import BenchmarkConfig, ConfigError
from flashtrain.examinee import Examinee
from flashtrain.launch import ENDED, REFUSED, STOPPED
from flashtrain.trained import join, open_trained

RECORD = "evaluations.jsonl"
LOOK_AGAIN = 15.0  # seconds, with --follow


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder or a checkpoint")
    parser.add_argument(
        "--text", action="append", default=[], metavar="FILE", help="UTF-8; repeatable"
    )
    parser.add_argument("--stride", type=int, help="tokens (default: the model's length)")
    parser.add_argument("--tasks", default="", help="of lm-eval, with commas between them")
    parser.add_argument("--task-folder", help="task files of your own")
    parser.add_argument("--shots", type=int, help="examples before each question")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time (8)")
    parser.add_argument(
        "--follow", action="store_true", help="every new checkpoint until the run ends"
    )
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", 0))
    try:
        config = wanted(options)
        device = join()
        return (
            follow(options, config, device)
            if options.follow
            else evaluate(options, config, options.run, device)
        )
    except (ValueError, OSError, CheckpointError) as error:  # a ConfigError among them
        if rank == 0:
            print(f"evaluate: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return STOPPED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def wanted(options: argparse.Namespace) -> BenchmarkConfig:
    """What to measure on. Refuses before a model is read."""
    if not options.text and not options.tasks:
        raise ConfigError("nothing to evaluate on: name --text FILE or --tasks NAME,NAME")
    for flag in ("batch_size", "stride", "limit"):
        if (number := getattr(options, flag)) is not None and number < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {number} must be 1 or more")
    config = BenchmarkConfig(
        texts=options.text,
        tasks=[task for task in options.tasks.split(",") if task],
        task_folder=options.task_folder,
        shots=options.shots,
        limit=options.limit,
    )
    check_benchmark(config)
    return config


def follow(options: argparse.Namespace, config: BenchmarkConfig, device: torch.device) -> int:
    """Evaluate the newest checkpoint, wait for the next one; end with the run."""
    if dist.is_initialized():
        raise ConfigError("--follow is for one process: each would see new checkpoints on its own")
    if not options.run.is_dir() or (options.run / "manifest.json").is_file():
        raise ConfigError(
            f"--follow waits for checkpoints of a run, and {options.run} is no run folder: name "
            "the folder that train.sh printed at its start"
        )
    run, seen = options.run, None
    while True:
        ended = (run / ENDED).is_file()
        steps = sorted((run / "checkpoints").glob("step-*/manifest.json"))
        newest = steps[-1].parent if steps else None
        if newest is not None and newest != seen:
            seen = newest
            try:
                evaluate(options, config, newest, device)
            except (OSError, CheckpointError) as error:  # deleted meanwhile: a newer one is there
                print(f"evaluate: {error}", file=sys.stderr)
        elif ended:
            return 0
        else:
            time.sleep(LOOK_AGAIN)


def evaluate(
    options: argparse.Namespace, config: BenchmarkConfig, run: Path, device: torch.device
) -> int:
    """Measure, print, record. Collective; rank 0 does all but the model's arithmetic."""
    trained = open_trained(run, device)
    examinee = Examinee(
        trained.decoder,
        trained.tokenizer,
        trained.config.data.sequence_length,
        options.batch_size,
        trained.peers,
    )
    rows = examinee.examine(
        lambda: [*on_texts(examinee, config.texts, options.stride), *on_tasks(examinee, config)]
    )
    if rows is None:
        return 0
    show(rows)
    record = trained.path.parent.parent / RECORD
    with record.open("a") as file:
        for row in rows:
            line = {"step": trained.step, "time": round(time.time(), 3), **row}
            file.write(json.dumps(line) + "\n")
    print(f"{trained.path}  (recorded in {record})")
    return 0


def show(rows: Sequence[Row]) -> None:
    texts = [row for row in rows if "text" in row]
    if texts:
        titles = f"{'tokens':>10}{'bytes':>11}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}"
        print(f"{'text':<32}{titles}")
    for row in texts:
        print(
            f"{Path(row['text']).name[:31]:<32}{row['tokens']:>10,}{row['bytes']:>11,}"
            f"{row['loss']:>9.4f}{row['perplexity']:>12.2f}{row['bits_per_byte']:>11.4f}"
        )
    for row in rows:
        if "task" in row:
            numbers = "  ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "task")
            print(f"{row['task']:<32}{numbers}")


if __name__ == "__main__":
    sys.exit(main())
