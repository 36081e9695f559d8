"""A run folder: everything one run reads, writes and can be resumed from.

`folder.py` is the folder itself, `publish.py` writes so that nothing is ever half there, `records.py` keeps metrics,
`curves.py` draws them, `environment.py` notes where they were made, `progress.py` reports while one waits, `compare.py`
lists and compares runs, `again.py` goes back to a step of one.
"""

from luciola.run.compare import RunInfo, differences, list_runs
from luciola.run.folder import Run, refuse_other_settings
from luciola.run.progress import duration, progress
from luciola.run.publish import atomic_write, publish_file, publish_folder, recover_folder
from luciola.run.records import read_records

__all__ = [
    "Run",
    "RunInfo",
    "atomic_write",
    "differences",
    "duration",
    "list_runs",
    "progress",
    "publish_file",
    "publish_folder",
    "read_records",
    "recover_folder",
    "refuse_other_settings",
]
