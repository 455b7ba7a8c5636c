"""One small model for all tests of the server, and in each file one server over it while its options stay the same."""

import importlib.util
from contextlib import ExitStack

import pytest

NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client", "httpx", "openai", "jsonschema", "yaml",
          "schemathesis")
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    collect_ignore_glob = ["test_*.py"]  # neither of the extras `server` and `test` is installed
else:
    import jsonschema
    import yaml
    from server_harness import running_server

    from jaxpaged import LLM

    class Holder:
        """At most one server at a time, as one thread drives the model."""

        def __init__(self, llm):
            self.llm = llm
            self._stack = ExitStack()
            self._options = None
            self._server = None

        def get(self, **options):
            if self._options != options:
                self.stop()
                self._server = self._stack.enter_context(running_server(self.llm, **options))
                self._options = options
            return self._server

        def stop(self):
            self._options = None
            self._stack.close()

    @pytest.fixture(scope="session")
    def loaded():
        """12 usable blocks of 16 tokens for 4 sequences: enough for one of 128 tokens, not for four."""
        return LLM(
            "demo", max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128, num_device_blocks=13,
            host_memory_bytes=2**22, preemption="swap", show_progress=False,
        )

    @pytest.fixture(scope="session")
    def warm_at():
        """How often compiled programs had been dropped when the model was last warmed up."""
        return []

    @pytest.fixture(scope="module")
    def holder(loaded, drops, warm_at):
        """All is run once more where compiled programs have been dropped since (tests/conftest.py)."""
        if warm_at != [len(drops)]:
            warm_at[:] = [len(drops)]
            loaded.warm_up()
            runner = loaded.engine.runner
            for bucket in runner.shapes.buckets.all:
                runner.warm_up(bucket, with_sampler=True)
        holder = Holder(loaded)
        yield holder
        holder.stop()

    @pytest.fixture
    def llm(holder, request):
        """The model; with no server over it, unless the test asks for one too."""
        if not {"server", "guarded"} & set(request.fixturenames):
            holder.stop()
        return holder.llm

    @pytest.fixture
    def server(holder):
        server = holder.get()
        yield server
        server.settle()

    @pytest.fixture
    def guarded(holder):
        """A server with the API key "open sesame"."""
        server = holder.get(api_key="open sesame")
        yield server
        server.settle()

    def _nullable(schema):
        """OpenAPI 3.0's `nullable: true` in the words of JSON Schema."""
        if isinstance(schema, list):
            return [_nullable(one) for one in schema]
        if not isinstance(schema, dict):
            return schema
        made = {key: _nullable(value) for key, value in schema.items()}
        if made.pop("nullable", False):
            return {"anyOf": [made, {"type": "null"}]}
        return made

    @pytest.fixture(scope="session")
    def contract(shared_data):
        """Checks a value against one schema of OpenAI's published contract, whatever we add beside it."""
        text = (shared_data / "openai" / "openapi.yaml").read_text()
        document = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        components = _nullable(document["components"])
        validators = {}

        def check(name, value):
            if name not in validators:
                schema = {"$ref": f"#/components/schemas/{name}", "components": components}
                validators[name] = jsonschema.Draft202012Validator(schema)
            validators[name].validate(value)

        return check
