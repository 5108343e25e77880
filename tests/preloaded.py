"""The last that the process imports from which `processes.py` forks: what it has is shared with the forks."""

import gc

gc.collect()
gc.freeze()  # no fork looks through all of it for garbage, which would copy it
