"""What every test shares: pytester, hypothesis profiles, and no network."""

import os

from hypothesis import settings

pytest_plugins = ["pytester"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors, and as many processes as there are cores
os.environ.pop("GITHUB_STEP_SUMMARY", None)

settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
