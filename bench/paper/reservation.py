"""The memory policies that paging is compared with: contiguous reservations (Kwon et al. 2023, sections 3.1 and 6.1).

A request runs only when a contiguous piece of KV memory is free for each of its sequences, as long as the policy says,
and keeps it to its end; nothing is shared. The engine, its kernels and the order of requests are the same as with
paging: a reservation only decides when a request may begin, for where its tokens lie makes no difference to the step.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxpaged.core.request import Request, SequenceGroup

Policy = Literal["max", "pow2", "oracle"]
"""The whole length of the model; the output rounded up to a power of two; exactly what will be needed."""
POLICIES: tuple[Policy, ...] = ("max", "pow2", "oracle")


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def reserved_tokens(request: Request, policy: Policy, max_model_len: int) -> int:
    """Token slots of one sequence of a request whose output ends by length."""
    if policy == "max":
        return max_model_len
    num_output = request.max_tokens if policy == "oracle" else next_power_of_two(request.max_tokens)
    return min(request.num_prompt_tokens + num_output, max_model_len)


@dataclass
class BuddyAllocator:
    """Pieces of powers of two, split in halves and joined again with their buddies.

    Room that is no power of two is the powers of two it is made of, largest first; what is asked for is rounded up.
    """

    num_slots: int
    _free: dict[int, set[int]] = field(default_factory=dict)
    """Starts of the free pieces of each size."""
    _taken: dict[int, int] = field(default_factory=dict)
    """Size by start."""
    _tops: dict[int, int] = field(default_factory=dict)
    """Of each whole piece that is never joined with another: size by start."""

    def __post_init__(self) -> None:
        start, size = 0, next_power_of_two(self.num_slots + 1) // 2
        while size:
            if self.num_slots & size:
                self._tops[start] = size
                self._free.setdefault(size, set()).add(start)
                start += size
            size //= 2

    def allocate(self, num_slots: int) -> int | None:
        """Start of a piece of at least `num_slots`, or None where no free one is large enough."""
        size = next_power_of_two(num_slots)
        found = min((free for free, starts in self._free.items() if starts and free >= size), default=None)
        if found is None:
            return None
        start = min(self._free[found])
        self._free[found].remove(start)
        while found > size:
            found //= 2
            self._free.setdefault(found, set()).add(start + found)
        self._taken[start] = size
        return start

    def free(self, start: int) -> None:
        """Give a piece back; KeyError if none begins there."""
        size = self._taken.pop(start)
        top = max(begin for begin in self._tops if begin <= start)
        while size < self._tops[top]:
            buddy = top + ((start - top) ^ size)
            if buddy not in self._free.get(size, ()):
                break
            self._free[size].remove(buddy)
            start, size = min(start, buddy), 2 * size
        self._free.setdefault(size, set()).add(start)


@dataclass
class IdealAllocator:
    """Pieces of any length with no room lost between them: better than any real allocator of contiguous memory."""

    num_slots: int
    _taken: dict[int, int] = field(default_factory=dict)
    _num_given: int = 0

    def allocate(self, num_slots: int) -> int | None:
        if num_slots > self.num_slots - sum(self._taken.values()):
            return None
        self._num_given += 1
        self._taken[self._num_given] = num_slots
        return self._num_given

    def free(self, start: int) -> None:
        del self._taken[start]


class ReservationGate:
    """Admits a request when a piece for each of its sequences is free (an `AdmissionGate` of the scheduler).

    Args:
        num_slots: KV slots of tokens there are.
        has_buddies: Pieces by a buddy allocator, as in the paper; otherwise ideally packed.
    """

    def __init__(self, policy: Policy, *, num_slots: int, max_model_len: int, has_buddies: bool = True) -> None:
        self.policy = policy
        self.max_model_len = max_model_len
        self.num_slots = num_slots
        self._memory = BuddyAllocator(num_slots) if has_buddies else IdealAllocator(num_slots)
        self._pieces: dict[str, list[int]] = {}

    def admit(self, group: SequenceGroup) -> bool:
        """All sequences of the request or none; ValueError for one that the memory could never hold."""
        request = group.request
        if request.request_id in self._pieces:
            return True
        num_tokens = reserved_tokens(request, self.policy, self.max_model_len)
        pieces: list[int] = []
        for _ in range(request.num_sequences):
            start = self._memory.allocate(num_tokens)
            if start is None:
                for piece in pieces:
                    self._memory.free(piece)
                if not self._pieces:
                    raise ValueError(
                        f"{request.num_sequences} pieces of {num_tokens} tokens do not fit in {self.num_slots} slots: "
                        "give more memory, or shorter requests"
                    )
                return False
            pieces.append(start)
        self._pieces[request.request_id] = pieces
        return True

    def leave(self, group: SequenceGroup) -> None:
        for piece in self._pieces.pop(group.request.request_id, ()):
            self._memory.free(piece)
