"""What of a run folder may be passed on: each file or folder, whether the guarantee covers it, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from privimage_fast.report.files import Metric

MEANS = "means.safetensors"


@dataclass(frozen=True)
class Release:
    """A file or folder of the run, and whether the guarantee covers it."""

    what: str
    path: str
    covered: bool
    why: str


def releases(run_dir: Path, metrics: list[Metric], secret_times: bool, asked: set[str]) -> list[Release]:
    """``asked``: the stages that the ledger charges."""
    learned = {"warmup": "noisy class means", "finetune": "noised gradient sums", "label": "noised gradient sums"}
    seen = " and ".join(dict.fromkeys(text for stage, text in learned.items() if stage in asked))
    training = f"trained on {seen} only; all intermediate weights are covered" if seen else "trained on public images only"
    rows = [
        Release("Synthetic images", "synthetic.npz", True, "drawn from the private model; drawing more costs nothing"),
        Release("Model weights", "model/", True, training),
        Release("Checkpoints", "checkpoints/", True, training + "; the pre-trained ones saw the noisy histogram at most"),
        Release("Noisy histogram", "query.json", True, "Gaussian noise was added before it was written; drawn once"),
        Release("Check of the query", "query-check.json", True, "computed from public images and the noisy histogram"),
        Release("Chosen public labels", "selection.json", True, "computed from the noisy histogram alone"),
        Release("Noisy class means and counts", MEANS, True, "Gaussian noise was added before they were written"),
        Release("Sheet of class means", "samples/means.png", True, "computed from the noisy class means"),
        Release(
            "Layer that labels images",
            "model/labeller.safetensors",
            True,
            "trained on noised gradient sums only; the labels in synthetic.npz follow from it and the images",
        ),
        Release("Share of labels kept", "labels.json", True, "computed from the private model and its labels"),
        Release("Sheet before fine-tuning", "samples/before.png", True, "drawn from the model that saw public images only"),
        Release("Sheet of synthetic images", "samples/after.png", True, "drawn from the private model"),
        Release(
            "Sheet of public images",
            "samples/public.png",
            True,
            "real images of the public set, chosen by the histogram; that set itself gets no protection",
        ),
        Release("Ledger and budget", "ledger.jsonl", True, "public parameters only; no loss, norm or realised batch size"),
        Release("Configuration", "config.yaml", True, "public, provided no value was tuned by looking at the sensitive set"),
    ]
    figures = any(not m.private for m in metrics)
    rows += [
        Release("Card", "README.md", not figures, "contains the metrics" if figures else "computed from the files above"),
        Release("Report", "report.html", not (figures or secret_times),
                "contains metrics or running times that are not private" if figures or secret_times
                else "computed from the files above; with real images of the public set"),
        Release("Card of the model", "model/README.md", True, "the card without what is not private"),
    ]  # fmt: skip
    if any(m.private for m in metrics):
        rows.append(Release("Metrics marked private", "metrics.json", True, "computed from synthetic images alone"))
    if figures:
        rows.append(Release("Metrics marked not private", "metrics.json", False, "computed on real images, without noise"))
    rows += [
        Release(
            "Nearest sensitive images", "samples/neighbours-not-private.png", False, "SHOWS SENSITIVE IMAGES: do not pass on"
        ),
        Release("Running times", "stages.json", False, "include those of stages that read real images")
        if secret_times
        else Release("Running times", "stages.json", True, "of stages that read no real image; the others' are not written"),
    ]
    # Card and report are about to be written, if they are not there.
    written = {"README.md", "report.html", "model/README.md" if (run_dir / "model").is_dir() else ""}
    return [row for row in rows if row.path in written or (run_dir / row.path).exists()]
