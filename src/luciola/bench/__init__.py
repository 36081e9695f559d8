"""Comparisons against other software, one a file: `luciola bench NAME` runs `luciola/bench/NAME.py`.

Each file has `PEERS` and a function `run(against) -> dict` that measures Luciola and a peer in one run, in turn, and
returns numbers, above all `ratio`; its first docstring line says what is compared. Peers come with the extra `bench`.
A comparison among our own ways of doing something has no peers, and its `run` no `against`. One that can start from any
model takes it as `run(model=PATH)`.
"""

# Files here that are no comparisons, but what these have in common.
SHARED = ("client", "contenders", "subjects", "turns")
