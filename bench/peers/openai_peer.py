"""Any OpenAI-compatible server as a peer, over HTTP: the worker process is a client with a thread for each request."""

import http.client
import json
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.worker import serve

TIMEOUT_S = 3600


class OpenAIPeer:
    """Holds the server's address and the name of its model between calls."""

    def __init__(self) -> None:
        self._url = urllib.parse.urlsplit("")
        self._model = ""

    def load(self, folder: str, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
        """Ask the server at the option `base_url` (.../v1) for its model. What it serves, the user answers for."""
        del folder, dtype
        start = time.perf_counter()
        self._url = urllib.parse.urlsplit(options["base_url"].rstrip("/"))
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise ValueError(f"base_url={options['base_url']!r} is no address: give one such as http://localhost:8000/v1")
        self._model = self._ask("GET", "/models")["data"][0]["id"]
        return {"load_s": time.perf_counter() - start, "device": f"server {self._url.netloc}, model {self._model}"}

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The server's JSON answer; RuntimeError with its words where it is no success."""
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._url.hostname or "", self._url.port, timeout=TIMEOUT_S)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, self._url.path + path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"{self._url.netloc}{path} answered {response.status}: {answer[:300]!r}")
        return json.loads(answer)

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> dict[str, Any]:
        """All requests at once, as token ids, greedily; a server tells how many tokens came, not which."""
        bodies = [
            {"model": self._model, "prompt": ids, "max_tokens": num, "temperature": 0, "ignore_eos": True}
            for ids, num in zip(prompts, max_tokens, strict=True)
        ]
        start = time.perf_counter()
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = list(pool.map(lambda body: self._ask("POST", "/completions", body), bodies))
        elapsed_s = time.perf_counter() - start
        return {"elapsed_s": elapsed_s, "num_tokens": [answer["usage"]["completion_tokens"] for answer in answers]}

    def finish(self) -> dict[str, Any]:
        """Nothing is known of another process."""
        return {}


def main() -> None:
    peer = OpenAIPeer()
    serve({"load": peer.load, "generate": peer.generate, "finish": peer.finish}, {})


if __name__ == "__main__":
    main()
