"""Where a Chromium is, if there is one."""

import os
import shutil

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HOW_TO_GET = "apt-get install chromium, or set CHROMIUM to its path"
