"""One start of the engine, as a process of its own: when each part of it was done, as one JSON line, the last.

    python -m bench.startup_worker '{"model": "demo", "spawned_s": 0.0, "is_all": false, "options": {}}'
"""

import time

BEGAN_S = time.monotonic()  # before anything else is imported

import json  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402


def start(model: str, options: dict[str, Any], *, is_all: bool) -> dict[str, Any]:
    """Seconds of each part, in their order, from the first line of this process; then what was started."""
    import jax  # noqa: PLC0415  timed

    from jaxpaged import LLM, SamplingParams  # noqa: PLC0415  timed

    imported_s = time.monotonic()
    device = jax.devices()[0]
    device_s = time.monotonic()
    llm = LLM(model, show_progress=False, **options)
    made_s = time.monotonic()
    if is_all:
        llm.warm_up()
    ready_s = time.monotonic()
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": [3, 4, 5, 6]}], params, use_tqdm=False)
    first_token_s = output.metrics.time_to_first_token_s
    assert first_token_s is not None
    warmed_s = llm.last_warm_up_s  # a part of the time to the first token
    parts = {
        "imports_s": imported_s - BEGAN_S,
        "device_s": device_s - imported_s,
        "load_s": llm.load_s,
        "engine_s": made_s - device_s - llm.load_s,
        "compile_s": ready_s - made_s + warmed_s,
        "first_token_s": first_token_s - warmed_s,
    }
    return {
        "parts": parts, "device": f"{device.platform} {device.device_kind}", "dtype": llm.engine.model_config.dtype,
        "num_compiles_after_warmup": llm.stats().num_compiles_after_warmup,
    }  # fmt: skip


def main() -> None:
    given = json.loads(sys.argv[1])
    began_s = BEGAN_S - given["spawned_s"]
    found = start(given["model"], given["options"], is_all=given["is_all"])
    found["parts"] = {"interpreter_s": began_s, **found["parts"]}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
