"""Lives here: four small programs that share keys and values as users do, each with what sharing saved.
May import: jaxpaged's public names, the standard library; `saving` for the measuring.
Must never come in: anything that a user of the package could not write.
Read first: `retrieval.py`, then `saving.py`.
"""
