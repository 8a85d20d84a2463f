import sys
from pathlib import Path

# pytest's importlib mode puts no folder of tests on the path; twin.py is imported from here.
sys.path.append(str(Path(__file__).parent))
