import pathlib
import sys

# Ours are found before a utils.py or networks/ of the user's folder, in which `python -m` looks first where there is no PYTHONSAFEPATH (before 3.11).
ROOT = str(pathlib.Path(__file__).resolve().parent.parent)
if sys.path[0] != ROOT:
    sys.path.insert(0, ROOT)
