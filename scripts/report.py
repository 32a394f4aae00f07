"""Curves, samples and configuration of a run as one HTML page: python scripts/report.py RUN..."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flashtrain.tracking.report import write_report


def main(folders: list[str]) -> int:
    if not folders or {"-h", "--help"} & set(folders):
        print(__doc__)
        return 0 if folders else 2
    try:
        for folder in folders:
            print(write_report(Path(folder)))
    except OSError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
