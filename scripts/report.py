"""A run as one HTML page that opens without a network: runs/NAME/report.html.

    python scripts/report.py runs/NAME
    python scripts/report.py runs/positions/*        # one page each

Curves (loss, learning rate, gradient norm, speed, memory, benchmarks), samples, evaluations,
environment, profile and configuration, all read from the run folder. A run that still trains can be
looked at as well: the same command makes the page anew. Several runs on one page: compare.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flashtrain.config import ConfigError
from flashtrain.tracking.report import write_report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    folders = parser.parse_args(arguments).runs
    if len(folders) > 1:  # what a shell's * brings along
        folders = [folder for folder in folders if (folder / "config.json").is_file()] or folders
    try:
        for folder in folders:
            print(write_report(folder))
    except (ConfigError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
