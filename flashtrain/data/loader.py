"""Micro-batches of any optimizer step, for one data-parallel rank, read ahead in the background.

Step s takes the next batch_size sequences of the endless order (samples.py), s * batch_size and
after where the batch has no ramp, and rank r of n their r-th contiguous part. So the global batch
depends on the seed and the step only, and resuming means asking for another step.
"""

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashtrain.data.mapped import DataError
from flashtrain.data.ramp import Ramp
from flashtrain.data.samples import Mixture, Samples

PREFETCH = 2  # steps read ahead: one hides reading, the second a slow disk's occasional pause


class Batch(NamedTuple):
    tokens: Tensor  # [b, T] int64
    labels: Tensor  # [b, T] int64: the token after each one; -100 where there is none to learn
    # [b, T] int64, a run of equal numbers is a document; None: tokens see all before them
    documents: Tensor | None = None


class DataLoader:
    """`step(s)` for training, from a background thread; `evaluation(n)` over held-out tokens.

    `data_time` is the number of seconds that `step` has waited for data since the start: close to
    0 while reading keeps up. Close the loader, or use it in a `with` block.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        micro_batch_size: int,
        data_rank: int = 0,
        data_size: int = 1,
        device: torch.device | str = "cpu",
        validation: Samples | None = None,
        ramp: Ramp | None = None,
    ) -> None:
        """Sizes as in DataConfig; `data_rank` of `data_size` is this rank on the data axis.

        ramp: to smaller batches and shorter sequences at the start. Raises DataError for a batch
        that does not divide.
        """
        if not 0 <= data_rank < data_size:
            raise DataError(f"data rank {data_rank} is not one of {data_size} data ranks")
        self.ramp = ramp or Ramp(batch_size, samples.sequence_length)
        for stage in self.ramp.stages:
            check_batch(stage.batch_size, micro_batch_size, data_size)
        self.samples, self.validation = samples, validation
        self.micro_batch_size = micro_batch_size
        self.data_rank, self.data_size = data_rank, data_size
        self.device = _numbered(torch.device(device))
        self.data_time = 0.0
        self._reader = _Reader(
            lambda step: self._read(self.samples, self._numbers(step)), self.device
        )

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step `step` (from 0) on the device; any step, any order.

        Steps in sequence come from the prefetched ones. An error of the background thread is
        raised here. Copies to a GPU are queued on the current stream; the host does not wait.
        """
        began = time.perf_counter()
        block = self._reader.get(step)
        self.data_time += time.perf_counter() - began
        return self._to_batches(block, self.ramp.stage(step).length)

    def evaluation(self, n_sequences: int) -> Iterator[Batch]:
        """This rank's part of the first `n_sequences` held-out samples, in their order."""
        if self.validation is None:
            raise DataError("this loader was given no validation data to evaluate on")
        if n_sequences % self.data_size:
            raise DataError(
                f"{n_sequences} evaluation sequences do not divide over {self.data_size} data ranks"
            )
        there = self.validation.n_samples
        if not 0 < n_sequences <= there:
            raise DataError(
                f"{n_sequences} evaluation sequences were asked for and {self.validation.name} "
                f"holds {there} of {self.validation.sequence_length} tokens: set "
                "trainer.evaluate_sequences within that or prepare more held-out text"
            )
        part = n_sequences // self.data_size
        first = self.data_rank * part
        for start in range(first, first + part, self.micro_batch_size):
            stop = min(start + self.micro_batch_size, first + part)
            block = self._read(self.validation, np.arange(start, stop))
            yield from self._to_batches(block, self.validation.sequence_length)

    def counters(self, steps: int) -> dict[str, float]:
        """Of a mixture, what the first `steps` optimizer steps took from each source."""
        if not isinstance(self.samples, Mixture):
            return {}
        return self.samples.counters(self.ramp.first_sample(steps))

    def close(self) -> None:
        """End all background threads and wait for them. Closing twice does nothing."""
        self._reader.end()
        self.samples.close()  # the thread may be waiting for a shard
        if self.validation is not None:
            self.validation.close()
        self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _numbers(self, step: int) -> NDArray[np.int64]:
        """Of the samples [batch_size / data_size] of this rank in step `step`."""
        part = self.ramp.stage(step).batch_size // self.data_size
        first = self.ramp.first_sample(step) + self.data_rank * part
        return np.arange(first, first + part)

    def _read(self, samples: Samples, numbers: NDArray[np.int64]) -> Tensor:
        """[2 or 3, n, T] int64 as `Samples.fill` has it; in pinned memory for a GPU."""
        pin = self.device.type == "cuda"
        shape = (3 if samples.packed else 2, len(numbers), samples.sequence_length)
        block = torch.empty(shape, dtype=torch.int64, pin_memory=pin)
        samples.fill(numbers, block.numpy())
        return block

    def _to_batches(self, block: Tensor, length: int) -> list[Batch]:
        """Micro-batches of as many tokens each, in sequences of `length`."""
        # one copy for all rows of all micro-batches; pinned memory is not used again before it is
        # through, which PyTorch's allocator sees to
        moved = block.to(self.device, non_blocking=True)
        parts = torch.split(moved, self.micro_batch_size, 1)
        return [Batch(*part.reshape(len(part), -1, length)) for part in parts]


def check_batch(batch_size: int, micro_batch_size: int, data_size: int) -> None:
    """DataError for a batch that micro-batches and data ranks do not divide."""
    if batch_size % (micro_batch_size * data_size):
        raise DataError(
            f"batch_size={batch_size} is not divisible by micro_batch_size={micro_batch_size} "
            f"x {data_size} data ranks"
        )


def _numbered(device: torch.device) -> torch.device:
    """`cuda` as this thread means it: the reading thread stands on GPU 0 whatever this one does."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


class _Reader:
    """A thread that reads the step wanted next and the PREFETCH - 1 after it."""

    def __init__(self, read: Callable[[int], Tensor], device: torch.device) -> None:
        self._read, self._device = read, device
        self._changed = threading.Condition()  # guards all below
        self._ready: dict[int, Tensor | BaseException] = {}
        self._wanted: int | None = None  # first step not handed out yet; None: nobody knows
        self._next = 0  # step the thread reads next
        self._jumps = 0  # times the sequence was left, so that a read begun before is dropped
        self._closed = False
        self._thread: threading.Thread | None = None

    def get(self, step: int) -> Tensor:
        with self._changed:
            if step != self._wanted:
                self._ready.clear()
                self._wanted = self._next = step
                self._jumps += 1
            if self._thread is None and not self._closed:
                # only now: before the first step nobody knows where the run resumes
                self._thread = threading.Thread(target=self._run, name="data", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            self._changed.wait_for(lambda: step in self._ready or self._closed)
            if self._closed:
                raise RuntimeError("this DataLoader is closed")
            block = self._ready.pop(step)
            # after an error the next call begins anew, whichever step it asks for
            self._wanted = None if isinstance(block, BaseException) else step + 1
            self._changed.notify_all()
        if isinstance(block, BaseException):
            raise block
        return block

    def end(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._may_read)
                if self._closed:
                    return
                step, jumps = self._next, self._jumps
                self._next += 1
            block: Tensor | BaseException
            try:
                if self._device.type == "cuda":
                    # a new thread stands on GPU 0, and pinning there would open a context on it
                    torch.cuda.set_device(self._device)
                block = self._read(step)
            except BaseException as error:  # handed over to the thread that trains
                block = error
            with self._changed:
                if jumps == self._jumps:
                    self._ready[step] = block
                    self._changed.notify_all()

    def _may_read(self) -> bool:
        if self._closed:
            return True
        return self._wanted is not None and self._next < self._wanted + PREFETCH
