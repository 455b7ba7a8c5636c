"""A runner without a model: it keeps what blocks hold, checks every history that is read, and draws tokens by hash.

A slot holds the hash of all tokens up to its own, and the layer group it is of. A step reads, as attention does, all
slots of groups without a window, and of the others those that some token of the step sees.
"""

from collections import deque
from collections.abc import Callable

from jaxpaged.core.request import FinishReason, Request, Sequence, SequenceGroup, TokenLogprobs
from jaxpaged.core.scheduler import Scheduler
from jaxpaged.core.scheduler_output import Candidate, RunnerOutput, SchedulerOutput, SequenceOutput
from jaxpaged.core.step_plan import num_logit_rows
from jaxpaged.sampling_params import SamplingParams

VOCAB = 50


def make_request(request_id: str, prompt: list[int] | tuple[int, ...], *, max_tokens: int = 8, **options) -> Request:
    """A request; `n`, `min_tokens`, `prompt_logprobs`, `logprobs` and `stop` go to its sampling parameters."""
    names = ("n", "min_tokens", "prompt_logprobs", "logprobs", "stop")
    params = {name: options.pop(name) for name in names if name in options}
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        max_tokens=max_tokens,
        stop_token_ids=frozenset(options.pop("stop_token_ids", ())),
        **options,
    )


def prefix_hashes(tokens: list[int]) -> list[int]:
    """What the slot of each position must hold: a hash of all tokens up to it."""
    hashes, last = [], 0
    for token in tokens:
        last = hash((last, token))
        hashes.append(last)
    return hashes


def next_token(tokens: list[int], seed: int, sample_index: int) -> int:
    return hash((prefix_hashes(tokens)[-1], seed, sample_index)) % VOCAB


def has_stop_string(outputs: list[int]) -> bool:
    """Stands for a stop string, found by the engine after the token is known."""
    return len(outputs) > 1 and (outputs[-1] + outputs[-2]) % 19 == 0


def find_end(parent: Sequence, token_id: int) -> tuple[FinishReason, str] | None:
    """Of a beam that goes on with this token."""
    return (FinishReason.STOP, "stop string") if has_stop_string([*parent.output_token_ids, token_id]) else None


def expected_tokens(request: Request, max_model_len: int, nonfinite: set[tuple[str, int]]) -> list[list[int]] | None:
    """The outputs of every sample, without any scheduler; None where the request ends in an error."""
    samples = []
    for sample_index in range(request.params.n):
        tokens, outputs = list(request.prompt_token_ids), []
        while True:
            if (request.request_id, len(outputs)) in nonfinite:
                return None
            outputs.append(next_token(tokens, request.seed, sample_index))
            tokens.append(outputs[-1])
            if outputs[-1] in request.stop_token_ids and len(outputs) >= request.params.min_tokens:
                break
            if len(outputs) >= request.max_tokens or len(tokens) >= max_model_len or has_stop_string(outputs):
                break
        samples.append(outputs)
    return samples


def candidates(tokens: list[int]) -> list[Candidate]:
    """Every token with a score, best first; no two sums of them are equal but by chance."""
    last = prefix_hashes(tokens)[-1]
    scores = {token: -(hash((last, token, 1)) % 99_991) / 20_000 for token in range(VOCAB)}
    scores[last % VOCAB] = -float("inf")  # banned
    return [Candidate(token, scores[token], None) for token in sorted(scores, key=lambda token: -scores[token])]


def expected_beams(
    request: Request, max_model_len: int, nonfinite: set[tuple[str, int]]
) -> list[tuple[list[int], float]] | None:
    """The hypotheses of a beam search and their scores, best first, without any scheduler; None where it fails."""
    beams = request.beams
    assert beams is not None
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    while True:
        if (request.request_id, len(live[0][1])) in nonfinite:
            return None
        every = [
            (total + candidate.score, [*outputs, candidate.token_id])
            for total, outputs in live
            for candidate in candidates([*request.prompt_token_ids, *outputs])[: beams.num_candidates]
            if candidate.score > -float("inf")
        ]
        every.sort(key=lambda entry: -entry[0])
        length = len(every[0][1])
        is_last = length >= request.max_tokens or len(request.prompt_token_ids) + length >= max_model_len
        going_on = []
        for rank, (total, outputs) in enumerate(every[: beams.num_candidates]):
            is_stop = outputs[-1] in request.stop_token_ids or has_stop_string(outputs)
            if not (is_stop or is_last):
                going_on.append((total, outputs))
            elif rank < beams.width:
                done.append((total / length**beams.length_penalty, outputs))
        done = sorted(done, key=lambda entry: -entry[0])[: beams.width]
        live = going_on[: beams.width]
        is_full = len(done) == beams.width
        if not live or (is_full and (beams.early_stopping or live[0][0] / length**beams.length_penalty <= done[-1][0])):
            return [(outputs, score) for score, outputs in done]


class FakeRunner:
    """Runs plans at once, in the order they come: as the device does."""

    def __init__(self, scheduler: Scheduler, nonfinite: set[tuple[str, int]]) -> None:
        manager = scheduler.block_manager
        self.scheduler = scheduler
        self.nonfinite = nonfinite
        """(request id, number of outputs so far) at which logits are not finite."""
        self.block_size = manager.block_size
        self.windows = manager.layout.windows
        self.device = [[None] * self.block_size for _ in range(manager.device.num_blocks)]
        self.host = [[None] * self.block_size for _ in range(manager.host.num_blocks)]
        self.num_unread = 0
        """Slots that lay before a window."""
        self.rows: dict[int, tuple[Sequence, int, list[int]]] = {}
        self.num_row_copies = 0
        """Rows that could begin as another's."""

    def run(self, output: SchedulerOutput) -> RunnerOutput:
        self.check_plan(output)
        for copy in output.swap_out:
            self.host[copy.target] = list(self.device[copy.source])
        for copy in output.swap_in:
            self.device[copy.target] = list(self.host[copy.source])
        read = [list(self.device[copy.source]) for copy in output.copies]
        for copy, content in zip(output.copies, read, strict=True):
            self.device[copy.target] = content
        histories = []
        for sequence, start, num_new, _ in output.scheduled:
            history = self.history(sequence)
            hashes = prefix_hashes(history)
            assert start + num_new <= len(history), "a token was scheduled that nobody has sampled"
            for position in range(start, start + num_new):
                for group in range(len(self.windows)):
                    block, offset = self.slot(sequence, group, position)
                    assert self.scheduler.block_manager.device.reference_counts[block] == 1, "a shared block is written"
                    self.device[block][offset] = (group, hashes[position])
            histories.append((history, hashes))
        results = []
        for item, (history, hashes) in zip(output.scheduled, histories, strict=True):
            sequence, start, num_new, num_samples = item
            for group, window in enumerate(self.windows):
                first = 0 if window is None else max(start - window + 1, 0)
                self.num_unread += first
                for position in range(first, start + num_new):
                    block, offset = self.slot(sequence, group, position)
                    name = f"position {position} of {sequence.request.request_id} in group {group}"
                    assert self.device[block][offset] == (group, hashes[position]), f"{name} is not its own"
            results.append(self.sample(sequence, history, hashes, start, num_new, num_samples))
        return RunnerOutput(tuple(results))

    def slot(self, sequence: Sequence, group: int, position: int) -> tuple[int, int]:
        """(block, offset) of a position in a layer group."""
        column, offset = divmod(position, self.block_size)
        return sequence.block_ids[column * len(self.windows) + group], offset

    def history(self, sequence: Sequence) -> list[int]:
        """The tokens of its row on the device, filled afresh for a new epoch."""
        assert sequence.row is not None
        held = self.rows.get(sequence.row)
        if held is None or held[:2] != (sequence, sequence.epoch):
            assert not sequence.num_pending_tokens or sequence.num_computed_tokens == len(sequence.token_ids)
            self.check_origin(sequence)
            held = self.rows[sequence.row] = (sequence, sequence.epoch, list(sequence.token_ids))
        history = held[2]
        if sequence.request.beams is not None:
            history[:] = sequence.token_ids  # what is chosen for a beam the device does not know
        assert history[: len(sequence.token_ids)] == list(sequence.token_ids)
        return history

    def check_origin(self, sequence: Sequence) -> None:
        """Where a fork's first row may begin as another, that one holds the tokens that were known when it forked."""
        origin = sequence.row_origin
        if origin is None or sequence.epoch:
            return
        parent, epoch, tokens = self.rows[origin.row]
        if (parent.sequence_id, epoch) == (origin.sequence_id, origin.epoch):
            self.num_row_copies += 1
            assert parent.request is sequence.request
            num_known = len(sequence.token_ids) - 1
            assert tokens[:num_known] == list(sequence.token_ids[:num_known])

    def sample(
        self, sequence: Sequence, history: list[int], hashes: list[int], start: int, num_new: int, num_samples: int
    ) -> SequenceOutput:
        request = sequence.request
        token_ids: tuple[int, ...] = ()
        is_finite = True
        if num_samples:
            assert start + num_new == len(history)
            first = sequence.sample_index
            token_ids = tuple(next_token(history, request.seed, first + i) for i in range(num_samples))
            is_finite = (request.request_id, len(history) - request.num_prompt_tokens) not in self.nonfinite
            if request.beams is not None:
                found = candidates(history)[: request.beams.num_candidates]
                return SequenceOutput((), (), (), is_finite, None, tuple(found))
            history.append(token_ids[0])
        prompt_logprobs = ()
        if request.params.prompt_logprobs is not None:
            prompt_logprobs = tuple(
                (p + 1, TokenLogprobs(history[p + 1], float(hashes[p]), 1, ()))
                for p in range(start, min(start + num_new, request.num_prompt_tokens - 1))
            )
        return SequenceOutput(token_ids, (), prompt_logprobs, is_finite)

    def check_plan(self, output: SchedulerOutput) -> None:
        limits = self.scheduler.limits
        assert not (output.swap_in and output.swap_out)
        assert sum(item.num_new_tokens for item in output.scheduled) <= limits.max_num_batched_tokens
        assert sum(num_logit_rows(item) for item in output.scheduled) <= limits.max_num_logits
        assert len({item.sequence.sequence_id for item in output.scheduled}) == len(output.scheduled)
        assert all(item.num_new_tokens > 0 for item in output.scheduled)
        targets = [copy.target for copy in output.copies]
        assert len(set(targets)) == len(targets)
        assert not set(targets) & {copy.source for copy in output.copies}
        if not limits.enable_chunked_prefill:
            assert all(item.num_samples for item in output.scheduled)


class Loop:
    """Scheduler and fake runner, `num_ahead` steps ahead of their results (0 is the plain synchronous loop)."""

    def __init__(self, scheduler: Scheduler, *, num_ahead: int = 1) -> None:
        self.scheduler = scheduler
        scheduler.searches.find_end = find_end
        self.nonfinite: set[tuple[str, int]] = set()
        self.runner = FakeRunner(scheduler, self.nonfinite)
        self.num_ahead = num_ahead
        self.in_flight: deque[tuple[SchedulerOutput, RunnerOutput]] = deque()
        self.groups: dict[str, SequenceGroup] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[str, int] = {}
        self.prompt_positions: dict[str, list[int]] = {}
        self.num_steps = 0

    def add(self, request: Request) -> SequenceGroup:
        group = self.scheduler.add(request)
        self.groups[request.request_id] = group
        return group

    def step(self, is_swap_failing: Callable[[], bool] = lambda: False) -> SchedulerOutput:
        output = self.scheduler.schedule()
        if (output.swap_in or output.swap_out) and is_swap_failing():
            output = self.scheduler.swap_failed(output)
            assert not output.swap_in
            assert not output.swap_out
        self.num_steps += 1
        if not output.is_empty:
            self.in_flight.append((output, self.runner.run(output)))
        while self.in_flight and (output.is_empty or len(self.in_flight) > self.num_ahead):
            self.read_back()
            if output.is_empty:
                break
        return output

    def read_back(self) -> None:
        events = self.scheduler.update(*self.in_flight.popleft())
        for event in events.prompt_logprobs:
            self.prompt_positions.setdefault(event.group.request.request_id, []).append(event.position)
        for event in events.tokens:
            sequence = event.sequence
            self.tokens.setdefault(sequence.sequence_id, []).append(event.token_id)
            if has_stop_string(sequence.output_token_ids):
                self.scheduler.finish(sequence, FinishReason.STOP, "stop string")
        assert all(sequence.is_finished for sequence in events.finished)
        for group in self.groups.values():
            if group.request.beams is not None:
                continue
            for sequence in group.sequences:
                told = self.tokens.get(sequence.sequence_id, [])
                assert told == sequence.output_token_ids

    def drain(self, is_swap_failing: Callable[[], bool] = lambda: False, most_steps: int = 3000) -> None:
        while self.scheduler.has_unfinished or self.in_flight:
            self.step(is_swap_failing)
            self.scheduler.check()
            most_steps -= 1
            assert most_steps, "no progress"

    def check_beams(self, group: SequenceGroup) -> None:
        expected = expected_beams(group.request, self.scheduler.limits.max_model_len, self.nonfinite)
        if not expected:  # a fault, or all beams came to where everything is banned
            assert {sequence.finish_reason for sequence in group.sequences} == {FinishReason.ERROR}
            return
        assert [sequence.output_token_ids for sequence in group.sequences] == [outputs for outputs, _ in expected]
        for sequence, (_, score) in zip(group.sequences, expected, strict=True):
            assert abs(sequence.score - score) < 1e-9
            assert sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)

    def check_outputs(self, aborted: set[str] = frozenset()) -> None:
        """Every request ended once and gave what it gives alone; nothing is held any more."""
        for request_id, group in self.groups.items():
            assert group.is_finished
            if request_id in aborted:
                continue
            if group.request.beams is not None:
                self.check_beams(group)
                continue
            expected = expected_tokens(group.request, self.scheduler.limits.max_model_len, self.nonfinite)
            reasons = {sequence.finish_reason for sequence in group.sequences}
            if expected is None:
                # a sample may have ended well before its mate met the fault
                assert FinishReason.ERROR in reasons
                continue
            assert [sequence.output_token_ids for sequence in group.sequences] == expected
            assert reasons <= {FinishReason.STOP, FinishReason.LENGTH}
            if group.request.params.prompt_logprobs is not None:
                assert self.prompt_positions.get(request_id, []) == list(range(1, group.request.num_prompt_tokens))
        self.scheduler.check()
        counts = self.scheduler.counts()
        assert counts.accepted == sum(counts.finished.values()) == len(self.groups)
        manager = self.scheduler.block_manager
        assert manager.device.num_referenced == manager.host.num_referenced == 0
