"""Reading the next tensors while the one before is used."""

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

KEPT_AHEAD_BYTES = 256 * 2**20
"""What may be read ahead of its turn where that costs no memory: enough that no thread waits for another."""

Finish = Callable[[], np.ndarray]
"""Waits for the end of a reading that was begun, and gives what was read."""


class ReadAhead:
    """Begins with tensors before their turn, as far as memory allows; gives each once it is asked for."""

    def __init__(self, begin: Callable[[str], Finish], num_bytes: Callable[[str], int]) -> None:
        """`begin(name)` begins to read a tensor, `num_bytes(name)` is what it takes."""
        self._begin = begin
        self._num_bytes = num_bytes
        self._expected: deque[str] = deque()
        self._most_ahead = 0
        self._begun: dict[str, Finish] = {}

    def expect(self, names: Iterable[str], *, are_kept: bool) -> None:
        """Take `names` for the order in which tensors will be asked for.

        What is begun before its turn takes half the memory of the largest of them at most; more where `are_kept`:
        where the arrays become the parameters, it will be taken anyway.
        """
        self._expected = deque(names)
        half = max(map(self._num_bytes, self._expected), default=0) // 2
        self._most_ahead = max(half, KEPT_AHEAD_BYTES) if are_kept else half

    def read(self, name: str) -> np.ndarray:
        """Return the tensor; whatever reading it raises comes from here."""
        finish = self._begun.pop(name, None)
        if finish is None:
            if self._expected and self._expected[0] == name:
                self._expected.popleft()
            finish = self._begin(name)
        data = finish()
        ahead = sum(map(self._num_bytes, self._begun))
        while self._expected and ahead + self._num_bytes(self._expected[0]) <= self._most_ahead:
            name = self._expected.popleft()
            ahead += self._num_bytes(name)
            self._begun[name] = self._begin(name)
        return data
