"""Make the screenshots of the documentation.

    python -m docs.pictures    # from the root of the repository; two minutes

It trains a perceptron on digits and a small language model on invented facts, and
takes pictures of the pages, of a notebook's cell and of TensorBoard. It needs Chromium
or Chrome on the PATH, the extra `test`, and `pip install playwright`.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from examples.common import make_trainer
from examples.counterfactuals import DigitsMLP
from examples.digits import EPOCHS, make_data
from examples.digits import make_trainer as make_digits_trainer
from examples.facts import make_data as make_blanks
from examples.facts import make_facts
from examples.language_model import LitCausalLM, small_gpt2
from lightning_trak import TRAK, TRAKCallback
from lightning_trak.callbacks import AttributionEvaluation
from lightning_trak.methods.showing import RAISES_OUTPUT
from lightning_trak.reporting.explanations import explain
from lightning_trak.reporting.html import page
from lightning_trak.reporting.scores import SavedScores
from lightning_trak.retraining import RetrainingFleet, random_subsets, read_fleet

OUT = Path(__file__).parent / "pictures"
CELL = (
    '<pre style="background: #f4f4f4; padding: .5rem">'
    "trak.show(top, train, targets)</pre>"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def digits(run: Path) -> tuple[Tensor, Subset, Subset]:
    """Train, attribute and evaluate; the loggers get the result."""
    train, targets = make_data()
    few = Subset(targets, range(60))
    loader = DataLoader(train, batch_size=100)
    masks = random_subsets(len(train), num_subsets=60)
    fleet = RetrainingFleet(
        run / "fleet", DigitsMLP, make_digits_trainer, loader, few, masks, num_seeds=2
    )
    fleet.run(together=60)
    snapshots = run / "snapshots"
    evaluation = AttributionEvaluation(
        {"TRAK": lambda model: TRAK(model, snapshots, run / "features")},
        loader,
        few,
        read_fleet(run / "fleet"),
        image=lambda item: item[0],
        describe=lambda item: f"a {item[1]}",
        shown=[0, 1, 2],
    )
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=TensorBoardLogger(run, name="", version="logs"),
        callbacks=[TRAKCallback(snapshots, every_n_epochs=4), evaluation],
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=15,
    )
    trainer.fit(DigitsMLP(), DataLoader(train, batch_size=100, shuffle=True))
    return evaluation.scores["TRAK"], Subset(train, range(len(train))), few


def facts(run: Path) -> tuple[Tensor, list[str], list[str]]:
    """Where a language model learned facts: scores, training sentences and queries."""
    train, queries, _ = make_blanks(*make_facts(40), num_facts=160)
    L.seed_everything(0, verbose=False)
    words = len(train.vocabulary) + 3
    network = small_gpt2(words, train.length, layers=1, tie_word_embeddings=False)
    model = LitCausalLM(network, lr=3e-3, weight_decay=0.01)
    trainer = make_trainer(40, TRAKCallback(run / "facts", every_n_epochs=20))
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True))
    trak = TRAK(model, run / "facts", run / "facts-features")
    loaders = DataLoader(train, batch_size=32), DataLoader(queries, batch_size=32)
    scores = trak.attribute(trainer, *loaders)
    texts = [[data.show(i) for i in range(len(data))] for data in (train, queries)]
    return scores, *texts


def write_page(
    path: Path,
    scores: Tensor,
    train: Sequence,
    targets: Sequence,
    shown: list[int],
    k: int,
) -> str:
    """The page that `lightning-trak show --out` makes; its address."""
    saved = SavedScores(scores, len(train), "TRAK")
    explanations = explain(saved, shown, k, train, targets)
    path.write_text(
        page(explanations, f"TRAK: {len(train)} training examples", RAISES_OUTPUT)
    )
    return path.as_uri()


def write_cell(path: Path, run: Path) -> str:
    """A notebook's cell and what `show` displays below it; the address of the page.

    Args:
        path: of the page.
        run: where `digits` has trained.
    """
    train, targets = make_data()
    few = TensorDataset(*targets[[0, 27]])
    trak = TRAK(DigitsMLP(), run / "snapshots", run / "features")
    top = trak.score(data=few, top_k=5)
    trak.show(top, train, few, describe=lambda item: f"a {item[1]}", out=path)
    path.write_text(path.read_text().replace("<body>", f"<body>{CELL}", 1))
    return path.as_uri()


@contextmanager
def tensorboard(logs: Path) -> Iterator[str]:
    """TensorBoard on a free port; its address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"http://localhost:{free.getsockname()[1]}/"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs)]
    options = ["--port", address.split(":")[-1].strip("/"), "--load_fast", "false"]
    with subprocess.Popen([*command, *options]) as process:
        try:
            for _ in range(60):
                try:
                    urllib.request.urlopen(address).close()
                    break
                except OSError:
                    time.sleep(1)
            yield address
        finally:
            process.terminate()


def photograph(
    browser: Browser, address: str, name: str, width: int, awaited: str = "body"
) -> None:
    """A picture of a page, saved with few colors.

    Args:
        browser: Chromium.
        address: of the page.
        name: of the file.
        width: of the window, in pixels.
        awaited: selects what must be on the page before the picture is taken.
    """
    page = browser.new_page(viewport={"width": width, "height": 600})
    page.goto(address)
    page.wait_for_selector(awaited)
    for button in page.query_selector_all("[aria-label='Toggle settings side pane']"):
        button.click()
    page.wait_for_timeout(2000)  # TensorBoard draws with animations
    path = OUT / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    page.close()
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} KiB")


def main() -> None:
    """Make all pictures."""
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        raise SystemExit(f"Found no browser: install one of {', '.join(BROWSERS)}.")
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        run = Path(directory)
        shown = write_page(run / "show.html", *digits(run), shown=[2], k=4)
        photograph(browser, shown, "show", 920)
        photograph(browser, write_cell(run / "cell.html", run), "notebook", 960)
        sentences = write_page(run / "facts.html", *facts(run), shown=[0, 1], k=3)
        photograph(browser, sentences, "sentence", 920)
        with tensorboard(run / "logs") as address:
            address += "?tagFilter=images|mean|per_target#timeseries"
            photograph(browser, address, "tensorboard", 1360, "histogram-card svg path")


if __name__ == "__main__":
    main()
