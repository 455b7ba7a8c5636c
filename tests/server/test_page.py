"""The page at /: it works in a real browser, and asks nobody but this server."""

import base64
import json
import re
import shutil
import socket
import subprocess
import time
from importlib.resources import files

import httpx
import pytest

from jaxpaged.engine.engine import Engine

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), "")
CHROMEDRIVER = shutil.which("chromedriver")
PAGE = files("jaxpaged.server").joinpath("page.html").read_text()


def test_the_page_is_whole_in_itself(server):
    answer = server.http.get("/")
    assert answer.status_code == 200
    assert answer.text == PAGE
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"(src|href)=\"(?!data:)", PAGE)
    assert "://" not in PAGE
    assert "innerHTML" not in PAGE  # what a model says is text, never markup


def test_what_the_page_and_the_dashboard_read_is_there(server):
    server.complete()
    server.chat("x", max_tokens=0)
    known = set(re.findall(r"^# TYPE (\S+)", server.http.get("/metrics").text, re.MULTILINE))
    lines = {line.split("{")[0] for line in server.http.get("/metrics").text.splitlines() if not line.startswith("#")}
    for name in re.findall(r'values\["([^"]+)"\]', PAGE):
        assert name in lines, name
    dashboard = files("jaxpaged.server").joinpath("grafana.json").read_text()
    names = set(re.findall(r"((?:vllm|jaxpaged):\w+)", dashboard))
    assert len(names) > 15
    for name in names:
        assert name in known | lines | {f"{one}_bucket" for one in known} | {f"{one}_total" for one in known}, name
    assert len(json.loads(dashboard)["panels"]) > 10


class Browser:
    """A headless Chromium through its driver's HTTP interface."""

    def __init__(self, driver_url):
        self._http = httpx.Client(base_url=driver_url, timeout=60, trust_env=False)
        arguments = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions",
            "--disable-background-networking", "--no-first-run", "--no-proxy-server", "--window-size=1200,800",
        ]
        options = {"binary": CHROMIUM, "args": arguments}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        value = self._send("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._session = f"/session/{value['sessionId']}"

    def _send(self, method, path, body=None):
        answer = self._http.request(method, path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]

    def open(self, url):
        self._send("POST", f"{self._session}/url", {"url": url})

    def run(self, script, *arguments):
        return self._send("POST", f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def log(self, kind):
        return self._send("POST", f"{self._session}/se/log", {"type": kind})

    def wait_for(self, script, seconds=30):
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, script
            time.sleep(0.05)
        return value

    def close(self):
        self._send("DELETE", self._session)
        self._http.close()


@pytest.fixture
def browser():
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("no chromium with chromedriver is installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([CHROMEDRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/status", trust_env=False).json()["value"]["ready"]:
                    break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        browser = Browser(f"http://127.0.0.1:{port}")
        yield browser
        browser.close()
    finally:
        process.terminate()
        process.wait()


SAY = """
document.getElementById("text").value = arguments[0];
document.getElementById("form").requestSubmit();
"""
SHOWN = "return [...document.querySelectorAll('.said')].map((box) => box.className + '|' + box.textContent)"


def hosts_asked(browser):
    """Where the page's requests went, of those that leave the browser."""
    found = set()
    for entry in browser.log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if url.startswith(("http:", "https:", "ws:", "wss:")):
                found.add(url.split("/")[2])
    return found


def test_one_can_chat_and_see_the_engine_in_a_browser(server, browser):
    browser.open(f"{server.url}/")
    browser.wait_for("return document.getElementById('state').textContent === 'ready'")
    browser.wait_for("return document.getElementById('model').textContent === 'demo'")
    browser.run("document.getElementById('temperature').value = 0; document.getElementById('max-tokens').value = 12;")
    browser.run(SAY, "Who goes <b>there</b>?")
    browser.wait_for("return document.querySelector('.assistant[data-done]') !== null")
    user, assistant = browser.run(SHOWN)
    assert user == "said user|Who goes <b>there</b>?"
    expected = server.chat("Who goes <b>there</b>?", max_tokens=12).json()["choices"][0]["message"]["content"]
    assert assistant == f"said assistant|{expected}"
    assert "tokens/s" in browser.run("return document.getElementById('rate').textContent")
    assert browser.run("return document.getElementById('first').textContent").endswith(" ms")
    browser.wait_for("return document.getElementById('num-blocks').textContent === '12'")
    browser.wait_for("return document.getElementById('total').textContent.endsWith('tokens/s')")
    # a second turn has the first in its prompt, and finds its beginning in the cache
    browser.run(SAY, "And now?")
    browser.wait_for("return document.querySelectorAll('.assistant[data-done]').length === 2")
    # what is too long is told, and the page goes on
    browser.run(SAY, "long " * 200)
    browser.wait_for("return document.querySelector('.error') !== null")
    assert "max_model_len is 128" in browser.run("return document.querySelector('.error').textContent")
    assert hosts_asked(browser) == {server.url.removeprefix("http://")}
    severe = [e["message"] for e in browser.log("browser") if e["level"] == "SEVERE" and "400" not in e["message"]]
    assert severe == []


def test_stop_ends_the_request(server, browser, monkeypatch):
    step = Engine.step

    def slow_step(engine):
        time.sleep(0.1)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow_step)
    browser.open(f"{server.url}/")
    browser.wait_for("return document.getElementById('state').textContent === 'ready'")
    aborted = server.llm.engine.finished_counts.by_reason["abort"]
    browser.run("document.getElementById('max-tokens').value = 100;")
    # stopped from within the page as soon as the first text is there
    browser.run("""
      new MutationObserver((changes, observer) => {
        if (!document.querySelector('.assistant')?.textContent) return;
        observer.disconnect();
        document.getElementById('form').requestSubmit();
      }).observe(document.getElementById('talk'), { childList: true, subtree: true, characterData: true });
    """)
    browser.run(SAY, "Speak on.")
    browser.wait_for("return document.querySelector('.assistant[data-done]') !== null")
    server.wait_until(lambda: server.engine.num_unfinished == 0)
    assert server.llm.engine.finished_counts.by_reason["abort"] == aborted + 1
    assert browser.run("return document.querySelector('.assistant').textContent")  # what had come stays


def test_a_browser_asks_for_the_key(guarded):
    answer = guarded.http.get("/")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic ")
    password = base64.b64encode(b":open sesame").decode()
    assert guarded.http.get("/", headers={"authorization": f"Basic {password}"}).text == PAGE
