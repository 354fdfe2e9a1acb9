import pathlib
import sys

# Find our utils.py and networks/ before those in the user's folder: without PYTHONSAFEPATH (Python before 3.11),
# `python -m` searches that folder first.
ROOT = str(pathlib.Path(__file__).resolve().parent.parent)
if sys.path[0] != ROOT:
    sys.path.insert(0, ROOT)
