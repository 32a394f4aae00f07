"""How processes end."""

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
