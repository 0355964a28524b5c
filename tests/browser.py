"""A look at a page with a real browser: headless chromium, no network."""

import pathlib
import re
import subprocess
import tempfile


def look(page, screenshot, size=(1000, 1900)):
    """Opens a file.  Returns (the document as the browser has it, its console's messages); writes `screenshot`."""
    with tempfile.TemporaryDirectory(prefix="presync-browser-") as profile:
        common = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                  "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars",
                  f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0"]
        url = pathlib.Path(page).resolve().as_uri()
        shot = subprocess.run([*common, f"--screenshot={screenshot}", f"--window-size={size[0]},{size[1]}", url],
                              capture_output=True, text=True, timeout=180, check=True)
        dom = subprocess.run([*common, "--dump-dom", url], capture_output=True, text=True, timeout=180, check=True)
    console = [line for line in (shot.stderr + dom.stderr).splitlines() if re.search(r"CONSOLE[:(]\d+", line)]
    return dom.stdout, console
