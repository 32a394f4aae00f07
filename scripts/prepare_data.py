"""Text files to token shards that data.path=FOLDER trains on.

    python scripts/prepare_data.py corpus/ --output data/corpus --vocabulary 32768
    python scripts/prepare_data.py *.jsonl.gz --output data/web --tokenizer gpt2/tokenizer.json
    python scripts/prepare_data.py books.parquet --output data/books --field content --workers 8

Reads .txt and .md (a file is a document), .jsonl (.gz, .zst) and .parquet, and folders of them.
The split is by hash of the text: see flashtrain/data/split.py. The format of what is written:
flashtrain/data/shards.py.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from flashtrain.data.prepare import Progress, Recipe, prepare
from flashtrain.data.shards import DataError, Manifest

STAGES = {"tokenizer": "training the tokenizer", "tokens": "writing tokens"}


def arguments() -> argparse.Namespace:
    default = Recipe()
    about, examples = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file or folder")
    add("--output", required=True, metavar="FOLDER", help="where the shards go")
    add("--tokenizer", default=default.tokenizer, metavar="bpe|bytes|PATH",
        help="bpe trains one on the input; PATH: a tokenizer.json or its folder")  # fmt: skip
    add("--vocabulary", type=int, default=default.vocabulary, metavar="N",
        help="size of a BPE trained here (default %(default)s)")  # fmt: skip
    add("--field", default=default.field, metavar="NAME",
        help="key or column of the text (default %(default)s)")  # fmt: skip
    add("--validation-share", type=float, default=default.validation_share, metavar="X",
        help="share of the text held out (default %(default)s)")  # fmt: skip
    add("--shard-tokens", type=int, default=default.shard_tokens, metavar="N",
        help="tokens in one file at most (default %(default)s)")  # fmt: skip
    add("--workers", type=int, default=1, metavar="N",
        help="processes that encode; the output does not depend on it (default 1)")  # fmt: skip
    add("--source", metavar="NOTE", help="where the text is from, its licence: kept with the data")
    add("--force", action="store_true", help="replace what is at --output")
    return parser.parse_args()


class Display:
    """A bar for each stage, over bytes of the input."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}
        self.began = self.latest = time.perf_counter()

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter()
        if progress.stage not in self.tasks:
            self.began = self.latest  # a stage starts where the one before reported last
            self.tasks[progress.stage] = self.bars.add_task(
                STAGES[progress.stage], total=progress.all_bytes, rate=""
            )
        task = self.tasks[progress.stage]
        self.latest = now
        rate = f"{progress.documents:,} documents"
        if progress.tokens:
            rate += f"  {progress.tokens / (now - self.began) / 1e6:.2f} M tokens/s"
        self.bars.update(task, completed=progress.done_bytes, rate=rate)


def summary(output: str, manifest: Manifest) -> list[str]:
    lines = [f"{output}: vocabulary {manifest.vocabulary:,}, {manifest.dtype}"]
    for name, split in manifest.splits.items():
        if split.tokens:
            lines.append(
                f"{name}: {split.tokens:,} tokens in {len(split.files)} files, "
                f"{split.text_bytes / split.tokens:.2f} bytes per token, "
                f"unigram entropy {split.unigram_entropy:.3f} nats per token"
            )
    for reason, count in manifest.bad_documents.items():
        lines.append(f"left out: {count:,} documents, {reason}")
    return lines


def main() -> int:
    options = arguments()
    recipe = Recipe(
        tokenizer=options.tokenizer,
        vocabulary=options.vocabulary,
        field=options.field,
        validation_share=options.validation_share,
        shard_tokens=options.shard_tokens,
    )
    console = Console(stderr=True)
    columns = ("{task.description}", "{task.percentage:3.0f} %", "{task.fields[rate]}")
    about, percent, rate = map(TextColumn, columns)
    try:
        with Bars(
            about, BarColumn(), percent, rate, TimeRemainingColumn(), console=console
        ) as bars:
            manifest = prepare(
                options.inputs,
                options.output,
                recipe,
                source=options.source,
                workers=options.workers,
                force=options.force,
                report=Display(bars),
            )
    except DataError as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True, highlight=False)
        return 2
    print("\n".join(summary(options.output, manifest)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
