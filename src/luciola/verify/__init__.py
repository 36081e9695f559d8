"""Verifiers: programs that say whether a completion is right, and never hang, crash or fail silently."""
