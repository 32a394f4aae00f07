"""How fast text becomes tokens and tokens become batches, on the cores this process may use.

    python scripts/bench_data.py                        # 200 MB, each part once
    taskset -c 0,1 python scripts/bench_data.py --megabytes 1000 --repeats 3

prepare: JSON lines to shards with a BPE of 32768 ids, beside Hugging Face `datasets` + `tokenizers`
(where installed) doing the same: the same tokenizer file, one map over all cores, ids to one array
on disk. Their ids are compared with ours, all of them. loader: batches out of the page cache, and
resident memory meanwhile. The text: words drawn as the embedded plays draw theirs (each by the two
before it), so that sentences differ, and new spellings appear as in real text.
"""

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from flashtrain.data import corpus
from flashtrain.data.loader import DataLoader
from flashtrain.data.prepare import Recipe, prepare
from flashtrain.data.samples import Blocks, Shuffled
from flashtrain.data.shards import TokenShards
from flashtrain.data.tokenizer import load_tokenizer, train_bpe

LETTERS = "etaoinshrdlucmfwyp"


def arguments() -> argparse.Namespace:
    about, examples = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--megabytes", type=int, default=200, metavar="N", help="of text (default %(default)s)")
    add("--repeats", type=int, default=1, metavar="N", help="of each measurement, in turns")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    add("--seconds", type=float, default=20.0, metavar="S", help="of the loader (each repeat)")
    add("--sequence-length", type=int, default=1024, metavar="N")
    add("--batch-size", type=int, default=512, metavar="N")
    add("--folder", metavar="FOLDER", help="where to work and leave the text (default: temporary)")
    return parser.parse_args()


def made_documents(size: int, seed: int = 1) -> Iterator[str]:
    """About `size` characters of documents of 200 to 20,000, a word in 500 a new one."""
    draw = random.Random(seed)
    words = [word for _, text in corpus.documents() for word in text.split(" ")]
    after: dict[tuple[str, str], list[int]] = {}
    for i in range(len(words) - 2):
        after.setdefault((words[i], words[i + 1]), []).append(i + 2)
    made = 0
    while made < size:
        target, at = int(200 * 100 ** draw.random()), draw.randrange(len(words) - 2)
        parts, length = [words[at], words[at + 1]], 0
        while length < target:
            places = after.get((parts[-2], parts[-1]))
            at = draw.choice(places) if places else draw.randrange(len(words))
            word = words[at]
            parts.append(word)
            if draw.random() < 0.002:
                word = "".join(draw.choices(LETTERS, k=draw.randint(3, 9)))
                parts += [word, words[at]]
            length += len(word) + 1
        text = " ".join(parts)
        made += len(text)
        yield text


def write_text(folder: Path, megabytes: int) -> Path:
    file = folder / f"made-{megabytes}.jsonl"
    if not file.exists():
        partial = file.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as stream:
            for text in made_documents(megabytes * 10**6):
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        partial.rename(file)
    return file


def prepare_ours(text: Path, tokenizer: Path, folder: Path, workers: int) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    prepare([text], folder, Recipe(str(tokenizer), validation_share=0), workers=workers)
    return time.perf_counter() - began


def prepare_theirs(text: Path, tokenizer: Path, folder: Path, workers: int, library: Any) -> float:
    """ids of all documents, each ended by the separator, in ids.bin: one uint16 or uint32 array."""
    from tokenizers import Tokenizer

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    inner = Tokenizer.from_file(str(tokenizer))
    inner.encode_special_tokens = True
    end = load_tokenizer(tokenizer).end_of_text

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = inner.encode_batch_fast(rows["text"], add_special_tokens=False)
        return {"ids": [[*encoding.ids, end] for encoding in found]}

    began = time.perf_counter()
    library.disable_progress_bars()
    rows = library.load_dataset(
        "json", data_files=str(text), split="train", cache_dir=str(folder / "cache")
    )
    # beside other processes, threads inside each of them are for the one process alone
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers == 1 else "false"
    ids = rows.map(encode, batched=True, remove_columns=["text"], num_proc=workers)
    dtype = np.dtype("<u2") if inner.get_vocab_size() <= 1 << 16 else np.dtype("<u4")
    with (folder / "ids.bin").open("wb") as stream:
        for batch in ids.with_format("arrow").iter(1024):
            stream.write(batch["ids"].combine_chunks().flatten().to_numpy().astype(dtype).data)
    return time.perf_counter() - began


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


def resident() -> float:
    """MB that this process holds now, without pages of files, which the shards' maps are."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize() / 1e6


def load(shards: Path, options: argparse.Namespace) -> tuple[float, list[float]]:
    """tokens/s out of the page cache, and memory at ten moments."""
    samples = Shuffled(Blocks(TokenShards(shards), options.sequence_length), seed=1)
    batch = options.batch_size
    TokenShards(shards).verify()  # reads every page
    memory: list[float] = []
    with DataLoader(samples, batch_size=batch, micro_batch_size=batch) as loader:
        loader.step(0)
        began, step = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < options.seconds:
            step += 1
            loader.step(step)
            if len(memory) < 10 * spent / options.seconds:
                memory.append(resident())
    return step * batch * options.sequence_length / spent, memory


def bench(options: argparse.Namespace, folder: Path) -> None:
    text = write_text(folder, options.megabytes)
    size = text.stat().st_size / 1e6
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        train_bpe((work for _, work in corpus.documents()), 32768).save(tokenizer)
    try:
        import datasets
    except ImportError:
        datasets = None
        print("datasets is not installed: its half is left out (`pip install datasets`)")
    print(f"text {size:.0f} MB of JSON lines, {options.workers} workers, "
          f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    ours, theirs = folder / "ours", folder / "theirs"
    for _ in range(options.repeats):
        seconds = prepare_ours(text, tokenizer, ours, options.workers)
        tokens = TokenShards(ours).tokens
        print(f"flashtrain             {seconds:7.1f} s {size / seconds:8.1f} MB/s "
              f"{tokens / seconds / 1e6:6.2f} M tokens/s")  # fmt: skip
        if datasets is not None:
            seconds = prepare_theirs(text, tokenizer, theirs, options.workers, datasets)
            print(f"datasets + tokenizers  {seconds:7.1f} s {size / seconds:8.1f} MB/s "
                  f"{tokens / seconds / 1e6:6.2f} M tokens/s")  # fmt: skip
            print(f"ids: {compare(ours, theirs)}")
    for _ in range(options.repeats):
        rate, memory = load(ours, options)
        print(f"loader                 {rate / 1e6:7.1f} M tokens/s, sequences of "
              f"{options.sequence_length}, batches of {options.batch_size}; resident MB over time: "
              + " ".join(f"{value:.0f}" for value in memory))  # fmt: skip


def main() -> int:
    options = arguments()
    if options.folder is not None:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
        bench(options, Path(options.folder))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        bench(options, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
