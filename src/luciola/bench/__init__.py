"""Comparisons against other software, one a file: `luciola bench NAME` runs `luciola/bench/NAME.py`.

Each file has a function `run() -> dict[str, object]` that measures Luciola and its peer in one process, in turn, and
returns numbers, above all `ratio`; its first docstring line says what is compared. Peers come with the extra `bench`.
"""
