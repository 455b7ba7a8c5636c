"""Logits processors: what is refused when they are given, and what they do to the rows that ask for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from logit_rows import MAX_MODEL_LEN, LogitRow, load_state, make_batch

from jaxpaged.runner.logits_processors import (
    MAX_TABLE_BYTES,
    PROCESSOR_TROUBLE,
    apply_processors,
    check_arguments,
    init_tables,
    load_arguments,
    pack_arguments,
    table_bytes,
    trace_processors,
    used_bits,
)
from jaxpaged.sampling_params import MAX_LOGITS_PROCESSORS, SamplingParams

VOCAB = 37


NO_IDS = np.full(3, -1)
MEGA = np.zeros((1024, 1024), np.float32)


def scale(logits, context, *, factor=1.0):
    return logits * factor


def favour(logits, context, *, ids=NO_IDS, bonus=(0.0, 0.0, 0.0), is_on=True):
    changed = logits.at[jnp.where(ids < 0, logits.shape[0], ids)].add(bonus, mode="drop")
    return jnp.where(is_on, changed, logits)


def forbid_repeats(logits, context):
    """No token that the sequence holds already."""
    return logits.at[context.token_ids].set(-jnp.inf, mode="drop")


def after_prompt(logits, context):
    return logits + (context.num_tokens - context.num_prompt_tokens).astype(jnp.float32)


def no_numbers(logits, context):
    return logits / (logits - logits)


FUNCTIONS = {
    "scale": scale, "favour": favour, "forbid_repeats": forbid_repeats, "after_prompt": after_prompt, "nan": no_numbers,
}


def traced(**functions):
    return trace_processors(functions, VOCAB, MAX_MODEL_LEN)


def applied(rows, functions=FUNCTIONS):
    """New logits and trouble of rows, each in its own state row."""
    processors = trace_processors(functions, VOCAB, MAX_MODEL_LEN)
    tables = init_tables(processors, len(rows))
    for i, row in enumerate(rows):
        check_arguments(processors, row.params)
        tables = load_arguments(tables, jnp.asarray(pack_arguments(processors, i, row.params)))
    logits, batch = make_batch(rows, len(rows) + 1, len(rows))  # and a row of padding
    uses = jnp.array([*(used_bits(processors, row.params) for row in rows), 0], jnp.int32)
    run = jax.jit(functools.partial(apply_processors, processors))
    changed, trouble = run(tables, jnp.asarray(logits), uses, load_state(rows, len(rows)), batch)
    return np.asarray(changed)[:-1], np.asarray(trouble)[:-1]


def row(seed, logits_processors=None, prompt=(1, 2, 3), output=(4, 4)):
    logits = np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 3
    return LogitRow(logits, SamplingParams(logits_processors=logits_processors), prompt=prompt, output=output)


def test_each_row_gets_what_it_asks_for_with_its_own_arguments():
    rows = [
        row(0, {"scale": {"factor": 2.5}}),
        row(1),
        row(2, {"scale": {}}),
        row(3, {"favour": {"ids": [5, 36, -1], "bonus": [1.0, -2.0, 9.0]}}),
        row(4, {"favour": {"ids": [5, 36, -1], "bonus": [1.0, -2.0, 9.0], "is_on": False}}),
        row(5, {"forbid_repeats": {}}, prompt=[7, 7, 9], output=[0]),
        row(6, {"after_prompt": {}}),
        row(7, {"favour": {"ids": [5, 5, 5], "bonus": np.array([1, 2, 3])}, "scale": {"factor": -1}}),
    ]
    changed, trouble = applied(rows)
    wanted = [row.logits.copy() for row in rows]
    wanted[0] *= np.float32(2.5)
    wanted[3][5] += 1
    wanted[3][36] -= 2
    wanted[5][[7, 9, 0]] = -np.inf
    wanted[6] += 2
    wanted[7] = -wanted[7]  # in the order they were given to the engine, not to the request
    wanted[7][5] += np.float32(6)
    np.testing.assert_allclose(changed, wanted, rtol=1e-6, atol=1e-6)  # one rounding per operation
    for untouched in (1, 2, 4):
        np.testing.assert_array_equal(changed[untouched], rows[untouched].logits)
    assert not trouble.any()


def test_a_row_keeps_its_bits_whatever_its_neighbours_ask_for():
    plain = row(0)
    loud = LogitRow(np.full(VOCAB, np.nan, np.float32), SamplingParams(logits_processors={"nan": {}, "scale": {}}))
    changed, trouble = applied([plain, loud, row(1, {"scale": {"factor": 1e30}})])
    np.testing.assert_array_equal(changed[0], plain.logits)
    assert trouble[0] == 0


def test_a_nan_or_no_finite_maximum_is_flagged_by_processor_and_row():
    functions = {
        "scale": scale,
        "nan": no_numbers,
        "one_nan": lambda logits, context: logits.at[3].set(jnp.nan),
        "nothing": lambda logits, context: jnp.full_like(logits, -jnp.inf),
        "infinite": lambda logits, context: logits.at[0].set(jnp.inf),
    }
    asked = [{"scale": {}}, {"nan": {}}, {"scale": {}, "one_nan": {}}, {"nothing": {}}, {"infinite": {}}, None]
    rows = [row(i, processors) for i, processors in enumerate(asked)]
    changed, trouble = applied(rows, functions)
    assert trouble.tolist() == [0, *(PROCESSOR_TROUBLE - i for i in (1, 2, 3, 4)), 0]
    np.testing.assert_array_equal(changed, [row.logits for row in rows])


def test_a_function_is_traced_once_and_never_called_again():
    calls = []

    def counted(logits, context):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("called again")
        return logits + 1

    processors = traced(counted=counted)
    for num_rows in (1, 3):
        rows = [row(i, {"counted": {}}) for i in range(num_rows)]
        logits, batch = make_batch(rows, num_rows, num_rows)
        tables = init_tables(processors, num_rows)
        uses = jnp.ones(num_rows, jnp.int32)
        changed, _ = apply_processors(processors, tables, jnp.asarray(logits), uses, load_state(rows, num_rows), batch)
        np.testing.assert_array_equal(changed, logits + 1)
    assert len(calls) == 1


def raises(logits, context):
    raise KeyError("no such thing")


def calls_back(logits, context):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(logits.shape, logits.dtype), logits)


def prints(logits, context):
    jax.debug.print("{}", logits[0])
    return logits


def branches(logits, context):
    return logits if logits[0] > 0 else -logits


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, "cannot be traced: KeyError: 'no such thing'"),
        (branches, "cannot be traced: TracerBool"),
        (calls_back, "calls back to the host"),
        (prints, "calls back to the host"),
        (lambda logits, context: logits[:3], r"returns float32\[3\]: it must return float32\[37\]"),
        (lambda logits, context: logits.astype(jnp.float16), r"returns float16\[37\]"),
        (lambda logits, context: (logits, logits), "returns tuple"),
        (lambda logits, context: None, "returns NoneType"),
        (lambda logits: logits, r"must take \(logits, context"),
        (lambda logits, context, more: logits, r"must take \(logits, context"),
        (lambda logits, context, **more: logits, r"must take \(logits, context"),
        (lambda logits, context, *, x: logits, "argument x needs a default"),
        (lambda logits, context, *, x="a": logits, "the default of x"),
        (lambda logits, context, *, x=None: logits, "the default of x"),
        (lambda logits, context, *, x=((1,), (1, 2)): logits, "the default of x"),
        (5, "is a int, not a function"),
    ],
)
def test_a_function_of_another_form_is_refused_by_name(function, message):
    with pytest.raises(ValueError, match=rf"logits_processors\['mine'\].*{message}"):
        traced(mine=function)


def test_wrong_collections_and_too_much_are_refused():
    with pytest.raises(ValueError, match="must be a mapping"):
        trace_processors([scale], VOCAB, MAX_MODEL_LEN)
    with pytest.raises(ValueError, match="the name 5"):
        trace_processors({5: scale}, VOCAB, MAX_MODEL_LEN)
    with pytest.raises(ValueError, match=f"at most {MAX_LOGITS_PROCESSORS}"):
        trace_processors(dict.fromkeys(map(str, range(17)), scale), VOCAB, MAX_MODEL_LEN)

    def large(logits, context, *, table=MEGA):
        return logits + table[0, 0]

    with pytest.raises(ValueError, match="lower max_num_seqs"):
        table_bytes({"large": large}, MAX_TABLE_BYTES // 2**22)


def test_the_tables_take_the_bytes_that_are_said_before_anything_is_traced():
    functions = {"scale": scale, "favour": favour}
    tables = init_tables(traced(**functions), 5)
    held = sum(array.nbytes for of_one in tables for array in of_one)
    # six rows of: a factor; three ids, three bonuses and a switch
    assert table_bytes(functions, 5) == held == 6 * (4 + 3 * 4 + 3 * 4 + 1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"other": {}}, "'other', which the engine does not have: choose among scale"),
        ({"scale": {"by": 1.0}}, "no argument 'by': its arguments are factor"),
        ({"forbid_repeats": {"x": 1}}, "no argument 'x': its arguments are it has none"),
        ({"scale": {"factor": [1.0]}}, r"'factor'\] has the shape \[1\]: it must have \[\]"),
        ({"favour": {"ids": [1, 2]}}, r"'ids'\] has the shape \[2\]: it must have \[3\]"),
        ({"favour": {"ids": [1, 2, 0.5]}}, r"'ids'\] does not fit int32"),
        ({"favour": {"ids": [1, 2, 2**40]}}, r"'ids'\] does not fit int32"),
        ({"favour": {"ids": [[1], 2, 3]}}, r"'ids'\] is ragged"),
        ({"favour": {"is_on": 2}}, r"'is_on'\] does not fit bool"),
        ({"scale": {"factor": 1e39}}, r"'factor'\] does not fit float32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(asked, message):
    processors = trace_processors(FUNCTIONS, VOCAB, MAX_MODEL_LEN)
    with pytest.raises(ValueError, match=f"logits_processors.*{message}"):
        check_arguments(processors, SamplingParams(logits_processors=asked))
