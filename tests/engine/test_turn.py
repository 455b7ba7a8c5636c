"""Whose turn it is."""

import threading

import pytest

from jaxpaged.engine.turn import Turn


def test_a_turn_within_a_turn_is_an_error_and_not_a_wait_without_end():
    turn = Turn()
    with turn.taken():
        with pytest.raises(RuntimeError, match="within a call of this LLM already"), turn.taken():
            pass
        with turn.if_free() as is_free:
            assert not is_free
    with turn.if_free() as is_free:
        assert is_free
        with pytest.raises(RuntimeError, match="already"), turn.taken():
            pass
    with turn.taken():
        pass


def test_another_thread_waits_for_the_turn_and_if_free_does_not():
    turn = Turn()
    seen = []

    def wait():
        with turn.if_free() as is_free:
            seen.append(is_free)
        with turn.taken():
            seen.append("has it")

    with turn.taken():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        assert seen == [False]
    thread.join(10)
    assert seen == [False, "has it"]


def test_a_turn_comes_back_after_an_error():
    turn = Turn()
    with pytest.raises(ZeroDivisionError), turn.taken():
        raise ZeroDivisionError
    with turn.if_free() as is_free:
        assert is_free
