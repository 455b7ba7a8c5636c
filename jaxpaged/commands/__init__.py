"""Lives here: what each verb of the command line does, one module per verb, and what they share (flags, output).
May import: everything of the package and what a verb needs, at the top: `jaxpaged.cli` imports a verb's module only
when the verb runs. `flags` and `output` are imported at every start and must stay light.
Must never come in: logic that Python users would want too; it belongs to `jaxpaged.llm` or below.
Read first: `jaxpaged.cli.make_parser`, then `generate`.
"""
