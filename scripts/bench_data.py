"""How fast text becomes tokens and tokens become batches, on the cores this process may use.

    python scripts/bench_data.py                        # 200 MB, each part once
    taskset -c 0,1 python scripts/bench_data.py --megabytes 1000 --repeats 3 --json data.json

prepare: JSON lines to shards with a BPE of 32768 ids, beside Hugging Face `datasets` + `tokenizers`
(where installed) doing the same: the same tokenizer file, one map, in one process and in as many as
there are cores, ids to one array on disk. Their ids are compared with ours, all of them. With
--workers 1 seconds of cores stand beside those of the clock, for machines whose cores are shared.

loader: batches out of the page cache, and resident memory meanwhile. cold: one epoch at most after
the shards were dropped from the page cache (a virtual disk may still have them in its host's), with
nothing announced, rows announced, whole shards read ahead, and out of a file:// folder through
data.cache_dir; each as fast as it goes, and the share of the time it is waited for where 5 M
tokens/s are asked for.

The text: documentation and sources of what is installed here, each file once (machine_text.py).
"""

import argparse
import gc
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from flashtrain.config import DataConfig
from flashtrain.data.loader import DataLoader
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.data.remote_source import open_remote
from flashtrain.data.samples import Blocks, Samples, Shuffled
from flashtrain.data.shards import TokenShards
from flashtrain.data.tokenizer import load_tokenizer, train_bpe
from flashtrain.data.windows import WindowShuffled
from scripts.parts import machine_text

SHARD_TOKENS = 1 << 23  # small, so that a small corpus has many
WINDOW = 2  # shards read at a time where whole shards are read ahead
LEARNED = 5000  # documents that the tokenizer is trained on
ASKED = 5e6  # tokens/s, what the data of a node have to keep up with
Note = Callable[[dict[str, Any], str], None]  # keeps a row and prints a line


def arguments() -> argparse.Namespace:
    about, examples = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--megabytes", type=int, default=200, metavar="N", help="of text (default %(default)s)")
    add("--repeats", type=int, default=1, metavar="N", help="of each measurement, in turns")
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that encode (default: cores)",
    )
    add("--seconds", type=float, default=20.0, metavar="S", help="of each loader (each repeat)")
    add(
        "--sequence-length",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of a sequence (default 1024)",
    )
    add(
        "--batch-size", type=int, default=512, metavar="N", help="sequences of a step (default 512)"
    )
    add("--parts", default="prepare,loader,cold", metavar="P,..", help="of these (default all); "
        "without prepare, on the shards that are in --folder")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write what was measured here")
    add("--folder", metavar="FOLDER", help="where to work and leave the text (default: temporary)")
    return parser.parse_args()


def write_text(folder: Path, megabytes: int) -> Path:
    """JSON lines that stay in `folder`."""
    file = folder / f"text-{megabytes}.jsonl"
    if not file.exists():
        begun = file.with_suffix(".partial")
        written = machine_text.write(begun, megabytes * 10**6) / 1e6
        if written < megabytes:
            print(f"this machine holds {written:.0f} MB of text, which is all there is to prepare")
        begun.rename(file)
    return file


def prepare_ours(text: Path, tokenizer: Path, folder: Path, workers: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    recipe = Recipe(str(tokenizer), validation_share=0, shard_tokens=SHARD_TOKENS)
    prepare([text], folder, recipe, workers=workers)


def prepare_theirs(text: Path, tokenizer: Path, folder: Path, workers: int, library: Any) -> None:
    """ids of all documents, each ended by the separator, in ids.bin: one uint16 or uint32 array."""
    from tokenizers import Tokenizer

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    inner = Tokenizer.from_file(str(tokenizer))
    end = load_tokenizer(tokenizer).end_of_text

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        inner.encode_special_tokens = True  # here: workers get a copy that has forgotten it
        found = inner.encode_batch_fast(rows["text"], add_special_tokens=False)
        return {"ids": [[*encoding.ids, end] for encoding in found]}

    library.disable_progress_bars()
    rows = library.load_dataset(
        "json", data_files=str(text), split="train", cache_dir=str(folder / "cache")
    )
    # beside other processes, threads inside each of them are for the one process alone
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers == 1 else "false"
    processes = workers if workers > 1 else None  # a pool of one would turn the threads off
    ids = rows.map(encode, batched=True, remove_columns=["text"], num_proc=processes)
    dtype = np.dtype("<u2") if inner.get_vocab_size() <= 1 << 16 else np.dtype("<u4")
    with (folder / "ids.bin").open("wb") as stream:
        for batch in ids.with_format("arrow").iter(1024):
            stream.write(batch["ids"].combine_chunks().flatten().to_numpy().astype(dtype).data)


def compare(ours: Path, theirs: Path) -> str:
    shards = TokenShards(ours)
    found = np.memmap(theirs / "ids.bin", shards.dtype, "r")
    if len(found) != shards.tokens:
        return f"DIFFERENT, {shards.tokens:,} here and {len(found):,} there"
    step = 1 << 24
    for at in range(0, len(found), step):
        part = found[at : at + step]
        if not np.array_equal(shards.read(at, len(part)), part):
            return f"DIFFERENT after token {at:,}"
    return "the same, all of them"


def resident() -> tuple[float, float]:
    """MB of this process that are its own, and that are pages of files, as the shards' maps are."""
    told = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    own, files = (int(told[key].split()[0]) * 1024 / 1e6 for key in ("RssAnon", "RssFile"))
    return own, files


def load(samples: Samples, options: argparse.Namespace) -> tuple[float, list[tuple[float, float]]]:
    """tokens/s, and memory at ten moments."""
    batch = options.batch_size
    memory: list[tuple[float, float]] = []
    with DataLoader(samples, batch_size=batch, micro_batch_size=batch) as loader:
        loader.step(0)
        began, step = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < options.seconds:
            step += 1
            loader.step(step)
            if len(memory) < 10 * spent / options.seconds:
                memory.append(resident())
    return step * batch * options.sequence_length / spent, memory


class Silent(TokenShards):
    """Says nothing beforehand: the disk is asked page by page, as the reader gets there."""

    def advise(self, start: int, length: int) -> None:
        pass


def whole(shards: TokenShards, length: int) -> Samples:
    return Shuffled(Blocks(shards, length), seed=1)


def by_shards(shards: TokenShards, length: int) -> Samples:
    return WindowShuffled(Blocks(shards, length, None, shards.sections), shards, 1, WINDOW)


def drop(folder: Path) -> None:
    """From the page cache; what is mapped anywhere stays."""
    for file in folder.glob("*.bin"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_cold(
    samples: Samples, options: argparse.Namespace, asked: float | None = None
) -> tuple[float, float]:
    """(tokens/s, share of the time that was waited) for one epoch at most, first step included.

    asked: tokens/s that the reader takes, and no more.
    """
    batch, began = options.batch_size, time.perf_counter()
    step, tokens = 0, batch * options.sequence_length
    with DataLoader(samples, batch_size=batch, micro_batch_size=batch) as loader:
        while (step + 3) * batch <= samples.n_samples:
            loader.step(step)
            step += 1
            spent = time.perf_counter() - began
            if spent > options.seconds:
                break
            if asked is not None:
                time.sleep(max(0.0, step * tokens / asked - spent))
        spent = time.perf_counter() - began
        return step * tokens / spent, loader.data_time / spent


def bench_cold(folder: Path, options: argparse.Namespace, note: Note) -> None:
    shards, length, cache = folder / "ours", options.sequence_length, folder / "cache"
    settings = DataConfig(cache_dir=str(cache), cache_gb=1e3)

    def remote() -> Samples:
        shutil.rmtree(cache, ignore_errors=True)
        url = f"file://{shards.resolve()}"
        return by_shards(open_remote(url, "train", 1 << 31, settings), length)

    ways: dict[str, Callable[[], Samples]] = {
        "nothing announced": lambda: whole(Silent(shards), length),
        "rows announced": lambda: whole(TokenShards(shards), length),
        f"{WINDOW} shards at a time, read ahead": lambda: by_shards(TokenShards(shards), length),
        f"file://, {WINDOW} shards at a time": remote,
    }
    for name, make in ways.items():
        row: dict[str, Any] = {"cold": name}
        for key, asked in (("tokens_s", None), ("waited_share", ASKED)):
            drop(shards)
            rate, waited = read_cold(make(), options, asked)
            row[key] = rate if asked is None else waited
            gc.collect()  # maps of a file keep it in the page cache
        told = f"{row['tokens_s'] / 1e6:7.1f} M tokens/s; waited for at {ASKED / 1e6:.0f} M "
        note(row, f"cold: {name:<32} {told}tokens/s {row['waited_share']:.1%}")


def bench_loader(folder: Path, options: argparse.Namespace, note: Note) -> None:
    for name, order in (("loader", whole), (f"loader, {WINDOW} shards at a time", by_shards)):
        shards = TokenShards(folder / "ours")
        shards.verify()  # reads every page
        rate, memory = load(order(shards, options.sequence_length), options)
        told = " ".join(f"{own:.0f}+{files:.0f}" for own, files in memory)
        note(
            {"loader": name, "tokens_s": rate, "resident_own_and_files_mb": memory},
            f"{name:<27} {rate / 1e6:7.1f} M tokens/s, sequences of {options.sequence_length}, "
            f"batches of {options.batch_size}; resident MB over time, own + files: {told}",
        )
        del shards
        gc.collect()


def bench_prepare(folder: Path, options: argparse.Namespace, note: Note) -> None:
    text = write_text(folder, options.megabytes)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        with text.open(encoding="utf-8") as lines:
            sample = (json.loads(line)["text"] for line in islice(lines, LEARNED))
            train_bpe(sample, 32768).save(tokenizer)
    ours, theirs = folder / "ours", folder / "theirs"

    def took(name: str, make: Callable[[], None]) -> None:
        began, spent = time.perf_counter(), sum(os.times()[:4])  # with children that have ended
        make()
        seconds, spent = time.perf_counter() - began, sum(os.times()[:4]) - spent
        split = TokenShards(ours).split
        size, tokens = split.text_bytes / 1e6, split.tokens
        row = {"prepare": name, "seconds": seconds, "mb_s": size / seconds,
               "tokens_s": tokens / seconds, "mb": size, "tokens": tokens,
               "documents": split.documents}  # fmt: skip
        told = ""
        if options.workers == 1:  # of more, some are children of a server that has not ended
            row["cpu_seconds"] = spent
            told = f" {spent:7.1f} s of cores"
        note(row, f"{name:<44} {seconds:7.1f} s{told} {size / seconds:8.1f} MB/s "
                  f"{tokens / seconds / 1e6:6.2f} M tokens/s")  # fmt: skip

    took("flashtrain", lambda: prepare_ours(text, tokenizer, ours, options.workers))
    try:
        import datasets
    except ImportError:
        print("datasets is not installed: its half is left out (`pip install datasets`)")
        return
    for processes in sorted({1, options.workers}):  # of one, `tokenizers` uses all cores by itself
        took(
            f"datasets {datasets.__version__} + tokenizers, {processes} processes",
            partial(prepare_theirs, text, tokenizer, theirs, processes, datasets),
        )
        same = compare(ours, theirs)
        note({"ids": same}, f"ids: {same}")


PARTS = {"prepare": bench_prepare, "loader": bench_loader, "cold": bench_cold}


def main() -> int:
    options = arguments()
    environment = {
        "machine": platform.machine(), "cores": len(os.sched_getaffinity(0)),
        "workers": options.workers, "load_before": os.getloadavg()[0], "python":
        platform.python_version(), "date": time.strftime("%Y-%m-%d"),
        "megabytes": options.megabytes, "shard_tokens": SHARD_TOKENS,
    }  # fmt: skip
    print("\n".join(f"{key}: {value}" for key, value in environment.items()))
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any], line: str) -> None:
        rows.append(row)
        print(line, flush=True)
        if options.json:
            tree = {"environment": environment, "rows": rows}
            options.json.write_text(json.dumps(tree, indent=2))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(options.repeats):
            for part in options.parts.split(","):
                PARTS[part](folder, options, note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
