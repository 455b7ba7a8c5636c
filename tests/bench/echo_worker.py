"""A worker for the tests: prints what would break the protocol if it reached the parent."""

from typing import Any

from bench.worker import serve


def echo(value: Any) -> Any:
    print("printed by a library")
    return value


def fail() -> None:
    raise ValueError("no value is not allowed")


if __name__ == "__main__":
    serve({"echo": echo, "fail": fail}, {"echo": "1"})
