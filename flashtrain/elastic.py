"""torchrun, which starts no worker again that was refused: `python -m flashtrain.elastic ...`.

Takes torchrun's arguments and ends as it does, but for two things. A worker that ended with REFUSED
has said why in one line; torchrun would have it say so at every restart. Here the restarts end, and
so does this process, with REFUSED. And where the other machines end the run, or never came to it,
one line says that.
"""

import sys

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api
from torch.distributed.run import main as torchrun

from flashtrain.launch import FAILED, REFUSED, leave


class Agent(LocalElasticAgent):
    """Torchrun's own, with no restarts left once a worker was refused."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if _refused(result.failures):
            self._remaining_restarts = 0
        return result


def main(arguments: list[str]) -> int:
    # torchrun has no option for it
    api.LocalElasticAgent = Agent  # type: ignore[attr-defined]
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        if not _refused(error.failures):
            raise
        return REFUSED
    except RendezvousError as error:
        print(
            f"flashtrain: the machines of this run do not meet, or one has ended it: {error}",
            file=sys.stderr,
        )
        return FAILED
    return 0


def _refused(failures: dict[int, ProcessFailure]) -> bool:
    return any(failure.exitcode == REFUSED for failure in failures.values())


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
