"""`python -m luciola`: the same program where the script `luciola` is not on the path."""

from luciola.cli import main

main()
