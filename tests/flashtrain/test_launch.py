"""How processes end."""

import os
import subprocess
import sys

ENDS = """
import atexit
from flashtrain.launch import leave
atexit.register(print, "what was to be done at the end")
print("the last line", end="")
leave(3)
"""


def test_leaving_loses_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "the last linewhat was to be done at the end\n"


def test_a_reader_that_went_away_changes_no_status() -> None:
    code = "from flashtrain.launch import leave; print('nobody reads this'); leave(0)"
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, env=buffered
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
