"""Faults of a pipeline's stages, brought to the last one: vLLM's executors hear no other's answer to a step.

Every stage before the last sends it one message a step, a fault or none, in the order of the steps, so that those in
flight at once are not mixed up. The last hears it when it has run the step itself, for which it needs their outputs
anyway; a stage waits for that when it has run the next step.
"""

import pickle
from collections import deque
from typing import Any

import torch

# Beside vLLM's own messages in the same group.
_TAG = 4130


class StageFaults:
    """One stage's. `group`: the stages' GroupCoordinator of vLLM."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._sent: deque[list[Any]] = deque()  # of each step: what is on its way, with its tensors

    def tell(self, fault: Any) -> None:
        """Of a stage before the last: why the step that it has just run did not serve its adapters, or None."""
        content = b"" if fault is None else pickle.dumps(fault)
        messages = [torch.tensor([len(content)])]
        if content:
            messages.append(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        last, group = self._group.ranks[-1], self._group.cpu_group
        self._sent.append([(torch.distributed.isend(one, last, group, _TAG), one) for one in messages])
        while len(self._sent) > 1:
            for work, _ in self._sent.popleft():
                work.wait()

    def hear(self) -> list[Any]:
        """Of the last stage: the faults of the others in the step that it has just run."""
        found = []
        for rank in self._group.ranks[:-1]:
            size = torch.zeros(1, dtype=torch.int64)
            torch.distributed.recv(size, rank, self._group.cpu_group, _TAG)
            if size.item():
                content = torch.empty(int(size.item()), dtype=torch.uint8)
                torch.distributed.recv(content, rank, self._group.cpu_group, _TAG)
                found.append(pickle.loads(content.numpy().tobytes()))
        return found
