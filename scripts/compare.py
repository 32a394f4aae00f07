"""Runs side by side: what differs, final loss, tokens/s, MFU, and their curves in one picture.

    python scripts/compare.py runs/positions/*                     # a table, the best run first
    python scripts/compare.py runs/a runs/b --picture both.svg     # and the curves
    python scripts/compare.py runs/* --metric train/grad_norm --picture norms.svg
    python scripts/compare.py runs/* --markdown

Losses are the last logged ones; tokens/s and MFU medians over the logged steps. Runs that still
train are taken as they are. Folders without a run are passed over where several are named.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flashtrain.config import ConfigError
from flashtrain.tracking.compare import as_text, best_first, comparison, overlaid, read_record


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="curves as SVG, into this file"
    )
    parser.add_argument("--metric", help="what to draw (default: training and validation loss)")
    parser.add_argument("--markdown", action="store_true", help="the table in Markdown")
    arguments = parser.parse_args()
    folders = arguments.runs
    if len(folders) > 1:  # what a shell's * brings along
        folders = [folder for folder in folders if (folder / "config.json").is_file()] or folders
    try:
        records = best_first([read_record(folder) for folder in folders])
        print(as_text(comparison(records), arguments.markdown))
        if arguments.picture is not None:
            arguments.picture.write_text(overlaid(records, arguments.metric))
            print(f"\n{arguments.picture}")
    except (ConfigError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
