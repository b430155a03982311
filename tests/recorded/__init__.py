"""What the processes of each release wrote, a file a release; `tests/unit/test_recorded.py` reads them all.

`python -m tests.recorded` writes the file of the present release: before it is released, and never again.
"""
