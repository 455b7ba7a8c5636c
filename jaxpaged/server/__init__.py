"""The server: OpenAI's HTTP API over one engine, which one thread drives.

May import: llm, engine, core, config, sampling_params; the extra `server` (starlette, uvicorn, pydantic, prometheus).
Must never come in: command lines, jax arrays, a URL or a file that a client named.
Read first: `async_engine.AsyncEngine`, then `app.make_app`. `config` alone imports nothing of the extra.
"""
