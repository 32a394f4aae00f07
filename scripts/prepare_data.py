"""Text to token shards that data.path=FOLDER trains on.

    python scripts/prepare_data.py corpus/ --output data/corpus --vocabulary 32768
    python scripts/prepare_data.py *.jsonl.gz --output data/web --tokenizer gpt2 --deduplicate
    python scripts/prepare_data.py books.parquet --output data/books --field content --workers 8
    python scripts/prepare_data.py hf:NAME:CONFIG:train --output data/hub --tokenizer tiktoken:NAME

Reads .txt and .md (a file is a document), .jsonl (.gz, .zst) and .parquet, folders of them, and one
Hugging Face data set hf:NAME[@REVISION][:CONFIG[:SPLIT]], streamed. Interrupted, the same command
goes on from its last save. Bad documents are counted and left out. The split is by hash of the text
(flashtrain/data/split.py); the format of what is written: flashtrain/data/shards.py.
"""

import argparse
import sys
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from flashtrain.data.bars import Bars
from flashtrain.data.encode import cores
from flashtrain.data.manifest import Manifest
from flashtrain.data.mapped import DataError
from flashtrain.data.prepare import Recipe, prepare


def arguments() -> argparse.Namespace:
    default = Recipe()
    about, examples = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder or hf:NAME")
    add("--output", required=True, metavar="FOLDER", help="where the shards go")
    add("--tokenizer", default=default.tokenizer, metavar="KIND",
        help="bpe trains one on the input; else bytes, a tokenizer.json or its folder, a Hugging "
        "Face model in the local cache, or tiktoken:NAME")  # fmt: skip
    add("--vocabulary", type=int, default=default.vocabulary, metavar="N",
        help="size of a BPE trained here (default %(default)s)")  # fmt: skip
    add("--field", default=default.field, metavar="NAME",
        help="key or column of the text (default %(default)s)")  # fmt: skip
    add("--validation-share", type=float, default=default.validation_share, metavar="X",
        help="share of the text held out (default %(default)s)")  # fmt: skip
    add("--shard-tokens", type=int, default=default.shard_tokens, metavar="N",
        help="tokens in one file at most (default %(default)s)")  # fmt: skip
    add("--deduplicate", action="store_true", help="leave out texts that came before, by hash")
    add("--longest", type=int, default=default.longest, metavar="BYTES",
        help="leave out longer documents (default %(default)s)")  # fmt: skip
    add("--workers", type=int, default=cores(), metavar="N",
        help="processes that encode; the output is the same (default: cores)")  # fmt: skip
    add("--source", metavar="NOTE", help="where the text is from, its licence: kept with the data")
    add("--force", action="store_true", help="replace what is at --output")
    return parser.parse_args()


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
        deduplicate=options.deduplicate,
        longest=options.longest,
    )
    console = Console(stderr=True)
    refuse = partial(console.print, style="red", soft_wrap=True, highlight=False, markup=False)
    again = "the same command goes on from its last save"
    try:
        with Bars(console) as bars:
            manifest = prepare(
                options.inputs,
                options.output,
                recipe,
                source=options.source,
                workers=options.workers,
                force=options.force,
                report=bars,
            )
    except KeyboardInterrupt:
        console.print(f"interrupted: {again}")
        return 130
    except DataError as error:
        refuse(str(error))
        return 2
    except BrokenProcessPool:
        refuse(f"a worker was killed, for want of memory as a rule (see --workers): {again}")
        return 1
    except OSError as error:  # a full disk, a file that went away
        refuse(f"{error}: {again}")
        return 1
    print("\n".join(summary(options.output, manifest)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
