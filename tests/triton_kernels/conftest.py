import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # compiled.py

# These run in the interpreter alone, started by test_interpreter.py.
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["interpreted/*"]
