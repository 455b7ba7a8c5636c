"""Laws of the detokenizer: increments add up to the whole, nothing shown is taken back, stop strings never show."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from jaxpaged.engine.detokenizer import MAX_PENDING, REPLACEMENT, Detokenizer
from jaxpaged.engine.tokenizer import Tokenizer

BOS, EOS = 0, 1
NUM_TOKENS = 290
quick = settings(max_examples=60, deadline=None, derandomize=True)


def byte_level() -> Tokenizer:
    """Every byte is a token, and a few longer ones; `<s>` is 0 and `</s>` is 1."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        ["the cat and the hat, stop the end of the cat 😀😀"] * 4,
        trainers.BpeTrainer(
            vocab_size=NUM_TOKENS,
            special_tokens=[AddedToken(token, special=True) for token in ("<s>", "</s>")],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, Path("."))


def byte_fallback() -> Tokenizer:
    """As Llama 2: a space is U+2581, the first one is dropped, and rare characters are tokens of one byte."""
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [("\u2581", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, Path("."))


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()


def feed(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    """The increments, the last of them from `finish`; checks that `text` is their sum all the way."""
    increments: list[str] = []
    for token_id in token_ids:
        increments.append(detokenizer.append(token_id))
        assert detokenizer.text == "".join(increments)
    increments.append(detokenizer.finish())
    assert detokenizer.text == "".join(increments)
    return increments


def cut_at_stop(text: str, stop: list[str], *, include: bool = False) -> tuple[str, str | None]:
    """The plain definition: the stop string that is complete first, and of two that end together the longer one."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    if not ends:
        return text, None
    end, _, found = min(ends)
    return text[: end if include else end - len(found)], found


def byte_ids(data: bytes) -> list[int]:
    """One token a byte, of the byte-level tokenizer."""
    pieces = {byte: piece for piece, byte in zip(*_alphabet(), strict=True)}
    ids = [BYTE_LEVEL._backend.token_to_id(pieces[byte]) for byte in data]
    assert None not in ids
    return ids


def _alphabet() -> tuple[list[str], list[int]]:
    # GPT-2's table: printable bytes stand for themselves, the others for the characters from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))], [*printable, *others]


# ---- increments


@quick
@given(st.lists(st.integers(0, NUM_TOKENS - 1), max_size=40), st.booleans())
def test_increments_add_up_to_the_whole_decode(token_ids: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, skip_special_tokens=skip)
    assert "".join(feed(detokenizer, token_ids)) == BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)


@quick
@given(st.binary(max_size=60))
def test_increments_add_up_for_any_bytes(data: bytes) -> None:
    token_ids = byte_ids(data)
    assert "".join(feed(Detokenizer(BYTE_LEVEL), token_ids)) == data.decode(errors="replace")


@quick
@given(st.lists(st.integers(0x80, 0xFF), min_size=20, max_size=60))
def test_increments_add_up_for_bytes_that_are_seldom_characters(data: list[int]) -> None:
    assert "".join(feed(Detokenizer(BYTE_LEVEL), byte_ids(bytes(data)))) == bytes(data).decode(errors="replace")


@quick
@given(st.text("ab é😀\n", max_size=30), st.text("ab é😀\n", max_size=12))
def test_output_behind_a_prompt_is_what_the_prompt_lacks_of_the_whole(prompt: str, output: str) -> None:
    for tokenizer in (BYTE_LEVEL, BYTE_FALLBACK):
        whole = tokenizer.encode(prompt + output, add_special_tokens=False) if prompt + output else []
        for cut in range(len(whole) + 1):
            before = tokenizer.decode(whole[:cut])
            if before.endswith(REPLACEMENT):
                continue  # inside a character: see below
            detokenizer = Detokenizer(tokenizer, prompt_token_ids=whole[:cut])
            assert before + "".join(feed(detokenizer, whole[cut:])) == tokenizer.decode(whole)


def test_a_character_comes_whole_with_its_last_byte() -> None:
    grin = byte_ids("a😀b".encode())
    assert feed(Detokenizer(BYTE_LEVEL), grin) == ["a", "", "", "", "😀", "b", ""]


def test_an_incomplete_character_at_the_end_is_shown_as_replaced() -> None:
    assert feed(Detokenizer(BYTE_LEVEL), byte_ids("a😀".encode()[:-1])) == ["a", "", "", "", REPLACEMENT]


def test_a_prompt_that_ends_inside_a_character_is_not_repeated() -> None:
    ids = byte_ids("the 😀!".encode())
    assert "".join(feed(Detokenizer(BYTE_LEVEL, prompt_token_ids=ids[:6]), ids[6:])) == "😀!"


def test_byte_tokens_behind_shown_text_never_take_it_back() -> None:
    # <0x41> is "A" alone, but decoded together with a byte that forms no character both are replaced
    a, wrong, b = 3 + 0x41, 3 + 0xE2, BYTE_FALLBACK._backend.token_to_id("b")
    assert feed(Detokenizer(BYTE_FALLBACK), [a, wrong, b]) == ["A", "", REPLACEMENT + "b", ""]


@quick
@given(st.lists(st.integers(0, 262), max_size=40))
def test_byte_fallback_takes_any_tokens(token_ids: list[int]) -> None:
    feed(Detokenizer(BYTE_FALLBACK), token_ids)


def test_special_tokens_are_left_out_or_shown_as_asked() -> None:
    ids = [*byte_ids(b"a"), EOS, *byte_ids(b"b")]
    assert feed(Detokenizer(BYTE_LEVEL), ids) == ["a", "", "b", ""]
    assert feed(Detokenizer(BYTE_LEVEL, skip_special_tokens=False), ids) == ["a", "</s>", "b", ""]


@pytest.mark.parametrize("token_ids", [[EOS] * 300, [10**6] * 300, byte_ids(b"\xff") * 300, byte_ids(b"\xe2") * 300])
def test_what_has_no_text_does_not_pile_up(token_ids: list[int]) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, prompt_token_ids=byte_ids(b"the"))
    longest = 0
    for token_id in token_ids:
        detokenizer.append(token_id)
        longest = max(longest, len(detokenizer._window))
    assert longest <= 8 + 2 * MAX_PENDING + 1


def test_a_prompt_of_special_tokens_only_is_no_text() -> None:
    assert feed(Detokenizer(BYTE_LEVEL, prompt_token_ids=[BOS] * 100), byte_ids(b"hi")) == ["h", "i", ""]


# ---- stop strings


@quick
@given(
    st.text("ab\n", max_size=30),
    st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4),
    st.booleans(),
    st.data(),
)
def test_the_first_stop_string_ends_the_text_however_tokens_cut_it(
    text: str, stop: list[str], include: bool, data: st.DataObject
) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, stop=stop, include_stop_str_in_output=include)
    expected, reason = cut_at_stop(text, stop, include=include)
    increments = feed(detokenizer, byte_ids(text.encode()))
    assert ("".join(increments), detokenizer.stop_reason) == (expected, reason)
    # nothing shown is ever part of the stop string: every increment is a piece of the expected text
    assert expected.startswith(detokenizer.text)
    # the same text in other tokens
    merged = Detokenizer(BYTE_LEVEL, stop=stop, include_stop_str_in_output=include)
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False) if text else []
    assert ("".join(feed(merged, ids)), merged.stop_reason) == (expected, reason)


def test_the_beginning_of_a_stop_string_waits_until_it_is_decided() -> None:
    ids = byte_ids(b"a STOr STOP b")
    increments = feed(Detokenizer(BYTE_LEVEL, stop=[" STOP"]), ids)
    assert increments == ["a", "", "", "", "", " STOr", "", "", "", "", "", "", "", ""]


def test_a_stop_string_inside_one_token_cuts_the_token() -> None:
    the = BYTE_LEVEL.encode("the", add_special_tokens=False)
    assert len(the) == 1
    detokenizer = Detokenizer(BYTE_LEVEL, stop=["h"])
    assert detokenizer.append(the[0]) == "t"
    assert detokenizer.stop_reason == "h"
    assert detokenizer.append(the[0]) == detokenizer.finish() == ""


def test_an_included_stop_string_is_shown_without_waiting() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, stop=["abc"], include_stop_str_in_output=True)
    assert feed(detokenizer, byte_ids(b"xabcd")) == ["x", "a", "b", "c", "", ""]
    assert detokenizer.stop_reason == "abc"


def test_what_was_held_back_is_shown_at_the_end() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, stop=["abc"])
    assert feed(detokenizer, byte_ids(b"xab")) == ["x", "", "", "ab"]
    assert detokenizer.stop_reason is None


def test_stop_strings_are_looked_for_behind_the_least_number_of_tokens() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, stop=["a"], min_tokens=3)
    assert "".join(feed(detokenizer, byte_ids(b"aababab"))) == "aab"
    assert detokenizer.stop_reason == "a"


def test_the_prompt_does_not_take_part_in_a_stop_string() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, prompt_token_ids=byte_ids(b"xa"), stop=["ab"])
    assert "".join(feed(detokenizer, byte_ids(b"bab!"))) == "b"


def test_a_long_stop_string_that_nearly_matches_costs_little() -> None:
    # a search that starts anew at every character would compare 3000 x 3000 x 20 characters here
    stop = ["a" * 100_000 + str(index) for index in range(20)]
    detokenizer = Detokenizer(BYTE_LEVEL, stop=stop)
    (a,) = byte_ids(b"a")
    for _ in range(3000):
        assert detokenizer.append(a) == ""
    assert detokenizer.finish() == "a" * 3000
