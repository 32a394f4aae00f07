"""Train a byte-level BPE tokenizer, for several data sets to share.

    python scripts/train_tokenizer.py corpus/ web.jsonl.gz --output tokenizer --vocabulary 32768
    python scripts/prepare_data.py web.jsonl.gz --output data/web --tokenizer tokenizer

Takes the inputs of prepare_data.py. What --validation-share holds out there teaches it nothing:
give both commands the same share and inputs.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.markup import escape

from flashtrain.data.bars import Bars
from flashtrain.data.inputs import open_input
from flashtrain.data.mapped import DataError
from flashtrain.data.prepare import BPE_SAMPLE, Recipe, train_texts
from flashtrain.data.split import split_document
from flashtrain.data.tokenizer import TOKENIZER_FILE, Tokenizer, train_bpe


def arguments() -> argparse.Namespace:
    default = Recipe()
    about, examples = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder or hf:NAME")
    add("--output", required=True, metavar="FOLDER", help="where tokenizer.json goes")
    add("--vocabulary", type=int, default=default.vocabulary, metavar="N",
        help="how many ids (default %(default)s)")  # fmt: skip
    add("--field", default=default.field, metavar="NAME",
        help="key or column of the text (default %(default)s)")  # fmt: skip
    add("--validation-share", type=float, default=default.validation_share, metavar="X",
        help="share of the text that is not looked at (default %(default)s)")  # fmt: skip
    add("--deduplicate", action="store_true", help="count texts that came before once, by hash")
    add("--sample", type=int, default=BPE_SAMPLE, metavar="N",
        help="characters to learn from, the first ones (default %(default)s)")  # fmt: skip
    return parser.parse_args()


def train(options: argparse.Namespace, bars: Bars) -> Tokenizer:
    folder = Path(options.output)
    if (folder / TOKENIZER_FILE).exists():
        raise DataError(f"{folder / TOKENIZER_FILE} is there already: name another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before the hours that training may take
    except OSError as error:
        raise DataError(f"--output {folder} cannot be made ({error.strerror})") from error
    recipe = Recipe(
        field=options.field,
        validation_share=options.validation_share,
        deduplicate=options.deduplicate,
    )
    recipe.check()
    text = open_input(options.inputs, recipe.field, recipe.longest)
    split = partial(split_document, share=recipe.validation_share, part=text.part)
    pieces = train_texts(text, split, recipe, bars, options.sample)
    tokenizer = train_bpe(pieces, options.vocabulary)
    tokenizer.save(folder)
    return tokenizer


def main() -> int:
    options = arguments()
    console = Console(stderr=True)
    try:
        with Bars(console) as bars:
            tokenizer = train(options, bars)
    except DataError as error:
        console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True, highlight=False)
        return 2
    print(f"{options.output}: vocabulary {tokenizer.size:,}, fingerprint {tokenizer.fingerprint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
