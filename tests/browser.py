"""Drive JupyterLab in a headless Chromium, as a reader would: open notebooks, run all cells, look, move a slider.

    pip install playwright
    python tests/browser.py                          # notebook 11, which has a slider
    python tests/browser.py 01 05 --screenshots out  # some notebooks; keep a screenshot of each

Needs a Chromium on the PATH (`chromium`, `chromium-browser` or `google-chrome`), or its path in --chromium; and
JupyterLab, either here or as another interpreter in --python. For each notebook the script opens it in a copy of the
checkout, chooses "Run All Cells" from the menu, waits until no cell is waiting or running, and fails where an output is
an error or a cell did not run. Where the notebook shows a slider, it moves it and checks that the picture changes.
Without --screenshots, pictures go nowhere.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
# What JupyterLab shows beside a cell: [ ] never run, [*] waiting or running, [3] done.
PROMPTS = "() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.textContent.trim())"


def serve(folder: Path, python: str, theme: str):
    """Start JupyterLab there, with settings of its own; returns its process and address."""
    settings = {
        "apputils-extension/themes": {"theme": theme},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"},  # else only the cells in view are in the page
    }
    for name, values in settings.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    environment = os.environ | {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--port={port}", "--no-browser", "--allow-root", "--IdentityProvider.token=", "--ServerApp.password="]
    options.append("--ServerApp.disable_check_xsrf=True")  # so that this script may stop kernels
    command = [python, "-m", "jupyter", "lab", *options, f"--ServerApp.root_dir={folder}"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=folder, env=environment, **silent)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api/status").close()
            return process, address
        except OSError:
            time.sleep(0.5)
    process.kill()
    raise SystemExit("JupyterLab did not start: does `python -m jupyter lab` work?")


def run_all(page, address: str, path: str, cells: int, patience: float) -> None:
    """Open the notebook, which has so many cells of code, choose Run All Cells, and wait until all have run."""
    page.goto(f"{address}/lab/tree/{path}?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
    page.wait_for_selector("text=/Python 3.*Idle/i", timeout=120_000)
    page.click(".lm-MenuBar-itemLabel:text-is('Run')")
    page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
    end, prompts = time.monotonic() + patience, ["[*]"]
    while time.monotonic() < end and any(prompt in ("[*]:", "[*]", "[ ]:") for prompt in prompts):
        page.wait_for_timeout(1000)
        prompts = page.evaluate(PROMPTS)
    done = [prompt for prompt in prompts if re.fullmatch(r"\[\d+\]:?", prompt)]
    assert len(done) == cells, f"{len(done)} of {cells} cells ran: {prompts}"
    errors = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")
    assert errors.count() == 0, errors.first.inner_text()


def move_slider(page) -> bool:
    """Move the first slider, if there is one, and wait until the picture beneath it changes."""
    slider = page.locator(".jupyter-widgets.widget-slider [role=slider], .jupyter-widgets .noUi-handle").first
    if slider.count() == 0:
        return False
    picture = page.locator(".jupyter-widgets.widget-html img").first
    picture.wait_for(timeout=30_000)
    before = picture.get_attribute("src")
    slider.scroll_into_view_if_needed()
    slider.focus()
    slider.press("ArrowLeft")
    page.wait_for_function(
        "before => [...document.querySelectorAll('.jupyter-widgets.widget-html img')].every(e => e.src !== before)",
        arg=before,
        timeout=30_000,
    )
    return True


def stop_kernels(address: str) -> None:
    """Each holds the models of its notebook; fourteen of them would fill the memory."""
    with urllib.request.urlopen(f"{address}/api/kernels") as answer:
        kernels = json.load(answer)
    for kernel in kernels:
        urllib.request.urlopen(urllib.request.Request(f"{address}/api/kernels/{kernel['id']}", method="DELETE")).close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["11"], help="how the file names begin")
    parser.add_argument("--screenshots", type=Path, help="a folder for them")
    parser.add_argument("--chromium", default=next(filter(None, map(shutil.which, BROWSERS)), None))
    parser.add_argument("--python", default=sys.executable, help="the Python that has JupyterLab")
    parser.add_argument("--patience", type=float, default=600, help="seconds that a notebook may take")
    parser.add_argument("--dark", action="store_true", help="JupyterLab's dark theme")
    arguments = parser.parse_args()
    if arguments.screenshots:
        arguments.screenshots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        series = Path(folder) / "series"
        shutil.copytree(ROOT, series, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache"))
        process, address = serve(series, arguments.python, "JupyterLab Dark" if arguments.dark else "JupyterLab Light")
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=QUIET)
        try:
            page = browser.new_page(viewport={"width": 1366, "height": 900})  # a laptop's
            for name in arguments.names:
                path = next((series / "notebooks").glob(f"{name}*.ipynb"))
                begin = time.monotonic()
                cells = sum(cell["cell_type"] == "code" for cell in json.loads(path.read_text())["cells"])
                run_all(page, address, path.relative_to(series).as_posix(), cells, arguments.patience)
                moved = move_slider(page)
                if arguments.screenshots:
                    page.locator(".jp-OutputArea-output img").last.scroll_into_view_if_needed()
                    page.screenshot(path=arguments.screenshots / f"{path.stem}.png")
                seconds = time.monotonic() - begin
                print(f"{path.name}: no error, {seconds:.0f} s{', slider moved' if moved else ''}", flush=True)
                stop_kernels(address)
        finally:
            browser.close()
            process.terminate()
