"""Look at token shards: samples with their document boundaries, lengths, sources, vocabulary.

    python scripts/inspect_data.py data/mine --samples 3
    python scripts/inspect_data.py data/web data/code --limit 100000000 --plot lengths.png
    python scripts/inspect_data.py fineweb10B --tokenizer tiktoken:gpt2 --vocabulary 50257

Takes what data.path takes: folders of prepare_data.py and their URLs, nanoGPT's and llm.c's files,
Megatron's prefixes. Ends of documents are marked in the samples; without a tokenizer ids are
printed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.console import Console
from rich.markup import escape

from flashtrain.config import ConfigError, DataConfig, MixSource
from flashtrain.data.dataset import Dataset
from flashtrain.data.documents import optional
from flashtrain.data.mapped import DataError
from flashtrain.data.paths import open_split
from flashtrain.data.published import find_tokenizer
from flashtrain.data.sampler import sample_index
from flashtrain.data.samples import count_samples
from flashtrain.data.shards import TokenShards
from flashtrain.data.survey import BUCKETS, Survey, documents_of, histogram, survey
from flashtrain.data.tokenizer import Tokenizer, load_tokenizer

ANY_ID = 1 << 20  # the vocabulary of files that do not say theirs


def arguments() -> argparse.Namespace:
    about, examples = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="as data.path")
    add("--split", default="train", choices=("train", "validation"), help="default train")
    add("--tokenizer", metavar="KIND", help="as data.tokenizer_path; default: the shards' own")
    add("--vocabulary", type=int, metavar="N", help="ids that there can be")
    add("--end-of-text", type=int, metavar="ID", help="what ends a document, without a tokenizer")
    add("--samples", type=int, default=2, metavar="N", help="to print (default %(default)s)")
    add("--length", type=int, default=200, metavar="N", help="tokens in one (default %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the choice of samples")
    add("--limit", type=int, metavar="N", help="tokens of each source that are counted")
    add("--cache-dir", metavar="FOLDER", help="as data.cache_dir, for URLs")
    add("--cache-gb", type=float, default=DataConfig.cache_gb, metavar="X",
        help="as data.cache_gb (default %(default)s)")  # fmt: skip
    add("--plot", metavar="FILE", help="lengths as a picture too (.png, .svg, .pdf)")
    return parser.parse_args()


def tokenizer_of(options: argparse.Namespace, tokens: Dataset) -> Tokenizer | None:
    if options.tokenizer is not None:
        return find_tokenizer(options.tokenizer)
    return load_tokenizer(tokens.folder) if isinstance(tokens, TokenShards) else None


def show_samples(
    options: argparse.Namespace, tokens: Dataset, tokenizer: Tokenizer | None, end: int | None
) -> None:
    length = max(1, min(options.length, tokens.tokens - 1))
    n_samples = count_samples(tokens, length)
    for number in range(min(options.samples, n_samples)):
        start = sample_index(options.seed, number, n_samples) * length
        ids = tokens.read(start, length).astype(np.int64)
        print(f"\n-- sample at token {start:,} of {tokens.name}")
        parts = documents_of(ids, end)
        for place, part in enumerate(parts):
            ended = place < len(parts) - 1
            own = (part[:-1] if ended else part).tolist()
            print(tokenizer.decode(own) if tokenizer is not None else " ".join(map(str, own)))
            if ended:
                print(f"<|end of a document, {len(own):,} tokens of it above|>")


def describe(found: Survey, size: int | None) -> list[str]:
    lines = [f"tokens {found.tokens:,}"]
    if found.documents:
        lines += [
            f"documents {found.documents:,}: {found.shortest:,} to {found.longest:,} tokens, "
            f"{found.length_sum / found.documents:,.1f} on average",
            *histogram(found.lengths),
        ]
    size = size or int(np.flatnonzero(found.counts).max()) + 1  # what the largest id implies
    order = np.sort(found.counts)[::-1].cumsum()
    half = int(np.searchsorted(order, found.tokens / 2)) + 1
    rare = int(((found.counts > 0) & (found.counts < 10)).sum())
    lines.append(
        f"vocabulary: {found.used_ids:,} of {size:,} ids occur ({found.used_ids / size:.1%}), "
        f"{rare:,} of them fewer than 10 times; {half:,} ids make up half of the tokens"
    )
    return lines


def plot(surveys: dict[str, Survey], file: str) -> None:
    optional("matplotlib", "--plot").use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, found in surveys.items():
        share = found.lengths / max(found.documents, 1)
        axes.step([2**bits for bits in range(BUCKETS)], share, where="pre", label=name)
    used = max(int(np.flatnonzero(found.lengths).max(initial=1)) for found in surveys.values())
    axes.set(xscale="log", xlim=(1, 2**used), xlabel="tokens", ylabel="share of the documents")
    axes.legend()
    figure.savefig(file, bbox_inches="tight")


def inspect(options: argparse.Namespace) -> None:
    for flag in ("length", "limit", "vocabulary"):
        if (number := getattr(options, flag)) is not None and number < 1:
            raise ConfigError(f"--{flag} {number} must be 1 or more")
    surveys: dict[str, Survey] = {}
    data = DataConfig(cache_dir=options.cache_dir, cache_gb=options.cache_gb)
    for path in options.paths:
        tokens = open_split(MixSource(path), options.split, options.vocabulary or ANY_ID, data)
        tokenizer = tokenizer_of(options, tokens)
        end = tokenizer.end_of_text if tokenizer is not None else options.end_of_text
        found = surveys[path] = survey(tokens, end, options.limit)
        size = tokenizer.size if tokenizer is not None else options.vocabulary
        print(f"\n== {path}", *describe(found, size), sep="\n")
        show_samples(options, tokens, tokenizer, end)
    if len(surveys) > 1:
        total = sum(found.tokens for found in surveys.values())
        print("\n== sources")
        for path, found in surveys.items():
            print(f"{found.tokens / total:7.2%}  {found.tokens:>17,} tokens  {path}")
    if options.plot:
        plot(surveys, options.plot)
        print(f"\nlengths of documents: {options.plot}")


def main() -> int:
    try:
        inspect(arguments())
    except (DataError, ConfigError) as error:
        Console(stderr=True).print(f"[red]{escape(str(error))}[/]", soft_wrap=True, highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
